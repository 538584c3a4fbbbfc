from flwr.serverapp import ServerApp, strategy

from lepton_strategies import SecureAggregation
from secure_flower.task import model

app = ServerApp()


@app.main()
def main(grid, context):
    nodes, rounds, keys = (context.run_config[name] for name in ("nodes", "rounds", "keys"))
    inner = strategy.FedAdam(min_available_nodes=nodes, fraction_evaluate=0.0)
    secure = SecureAggregation(inner, keys=keys, clip_norm=10.0, metrics=["train_loss"], min_cohort=nodes)
    secure.start(grid, model(), num_rounds=rounds)
