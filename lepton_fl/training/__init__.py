"""Local training and evaluation. Importing ``lepton_fl.training.trainer`` imports torch."""
