"""The coordinator's settings: defaults that work, bounds that hold, a description of every key."""

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from lepton_server.config import ServerConfig
from lepton_server.device_service import endpoints_of, hosts_of


def test_an_empty_file_is_a_configuration():
    config = ServerConfig()
    assert config.store_url == f"sqlite:///{Path('lepton-state').absolute()}/lepton.db"
    assert config.blob_dir == Path("lepton-state/blobs")


def test_what_is_given_counts():
    store = {"url": "postgresql://db/lepton", "blobs": "/srv/blobs"}
    config = ServerConfig.model_validate(
        {"store": store, "listen": {"public_names": ["a.example", "10.0.0.1"]}}
    )
    assert (config.store_url, config.blob_dir) == (store["url"], Path("/srv/blobs"))
    assert hosts_of(config.listen) == ("a.example", "10.0.0.1")
    assert endpoints_of(config.listen, 1, 2, 3).fleet == "a.example:3"


def test_a_host_without_a_name_of_its_own_serves_itself(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "no-such-host.invalid")
    assert hosts_of(ServerConfig().listen) == ("127.0.0.1",)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("listen", "device_port", 65_536),
        ("listen", "device_port", 9440),  # the enrolment port's default
        ("listen", "public_names", ["a:9440/x"]),
        ("listen", "public_names", [""]),
        ("tls", "renew_at", 1.0),
        ("tls", "device_certificate_days", float("nan")),
        ("tls", "device_certificate_days", 399),
        ("check_in", "interval_s", 0),
        ("check_in", "interval_s", float("inf")),
        ("check_in", "jitter", 1.0),
        ("limits", "max_message_bytes", 10),
        ("log", "level", "loud"),
        ("server", "nmae", "x"),
        ("sever", "name", "x"),
    ],
)
def test_what_cannot_work_is_refused(section, key, value):
    with pytest.raises(ValidationError):
        ServerConfig.model_validate({section: {key: value}})


def test_every_key_is_described():
    for name, section in ServerConfig.model_fields.items():
        model = section.annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        assert model.__doc__.startswith(f"[{name}]")
        for field in model.model_fields.values():
            assert field.description
