"""Generated from proto/lepton/v1 by proto/generate; do not edit."""
