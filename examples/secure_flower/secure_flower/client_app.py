from flwr.clientapp import ClientApp

from lepton_strategies import secure_mod
from secure_flower.task import train

app = ClientApp(mods=[secure_mod()])
app.train()(train)
