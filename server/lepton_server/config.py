"""What the operator of a coordinator can set, with its unit, default and bounds.

Every key has a default, so an empty file is a valid configuration. Unknown keys are refused. Example::

    [server]
    name = "factory floor"
    state_dir = "/var/lib/lepton"
    [listen]
    public_names = ["fl.example.org"]
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerSection(_Section):
    """[server]: what this coordinator is called and where it keeps its state."""

    name: str = Field(
        default="lepton", min_length=1, max_length=100, description="Shown to people; no effect."
    )
    state_dir: Path = Field(
        default=Path("lepton-state"),
        description="Folder of keys, database and blobs; made with mode 0700. One coordinator per folder.",
    )
    standby: bool = Field(
        default=False,
        description="Wait while another coordinator leads, and take over when it ends; "
        "needs PostgreSQL, the same keys and shared blobs. Off = refuse to start then.",
    )


class ListenSection(_Section):
    """[listen]: addresses and ports."""

    host: str = Field(
        default="0.0.0.0",  # noqa: S104 - devices come from elsewhere; every port speaks TLS and checks who calls
        min_length=1,
        description="Address that the three device ports bind; 127.0.0.1 keeps them on this machine.",
    )
    enrolment_port: Port = Field(
        default=9440, description="gRPC, server TLS: Enroll and Renew. 0 = any free port."
    )
    device_port: Port = Field(
        default=9441, description="gRPC, client certificate demanded: CheckIn and Wait."
    )
    fleet_port: Port = Field(default=9442, description="Flower's fleet API (HTTPS): the messages of a round.")
    ops_host: str = Field(
        default="127.0.0.1", min_length=1, description="Address that the operations port binds."
    )
    ops_port: Port = Field(default=9443, description="HTTP: /healthz, /readyz and /metrics.")
    public_names: tuple[str, ...] = Field(
        default=(),
        max_length=32,
        description="Host names and IP addresses by which devices reach this machine; the first is "
        "advertised, all are in the server certificate. Empty = this host's name.",
    )

    @field_validator("public_names")
    @classmethod
    def _names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not 1 <= len(name) <= 253 or any(c.isspace() or c in "/@[]" for c in name):
                raise ValueError(f"Expected host names or IP addresses without a port, got {name!r}")
        return names

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        chosen = [p for p in (self.enrolment_port, self.device_port, self.fleet_port, self.ops_port) if p]
        if len(set(chosen)) != len(chosen):
            raise ValueError(f"Expected four different ports, got {sorted(chosen)}")
        return self


class TlsSection(_Section):
    """[tls]: lifetimes of certificates."""

    device_certificate_days: float = Field(
        default=30.0,
        ge=1 / 86_400,
        le=398,
        allow_inf_nan=False,
        description="Life of a device's certificate, days.",
    )
    renew_at: float = Field(
        default=2 / 3,
        gt=0,
        lt=1,
        allow_inf_nan=False,
        description="Part of its life after which a device is told to renew its certificate.",
    )


class StoreSection(_Section):
    """[store]: the database and the files."""

    url: str = Field(
        default="",
        description="Database URL, e.g. postgresql+psycopg://user@host/lepton. Empty = SQLite in state_dir.",
    )
    blobs: Path | None = Field(
        default=None,
        description="Folder of checkpoints and artefacts, named by hash. Empty = blobs in state_dir.",
    )


class AuthoritySection(_Section):
    """[authority]: the enrolment authority, which certifies the keys that devices sign secure rounds with."""

    public_key: str = Field(
        default="",
        pattern=r"^([0-9a-f]{64})?$",
        description="Its public key, 64 hexadecimal digits, as `lepton authority create` printed it. Devices "
        "pin it. Empty, and no key_file = none: no runs with secure aggregation.",
    )
    key_file: Path | None = Field(
        default=None,
        description="Its private key, if this machine is to certify by itself. Whoever has it and this "
        "coordinator can invent devices: better keep it elsewhere and use `lepton authority`.",
    )
    certificate_days: float = Field(
        default=365.0,
        ge=1,
        le=3650,
        allow_inf_nan=False,
        description="Life of a signing certificate, days; devices ask for the next in its last third.",
    )


class CheckInSection(_Section):
    """[check_in]: how often idle devices call."""

    interval_s: Seconds = Field(
        default=60.0, le=86_400, description="Mean time between two check-ins of an idle device, seconds."
    )
    jitter: float = Field(
        default=0.25,
        ge=0,
        le=0.9,
        allow_inf_nan=False,
        description="Each interval is drawn from interval * (1 ± jitter).",
    )
    max_rate: float = Field(
        default=500.0,
        gt=0,
        allow_inf_nan=False,
        description="Check-ins per second that the whole fleet may cause; the interval grows with the fleet.",
    )
    max_waiting: int = Field(
        default=2_000, ge=0, le=100_000, description="Devices that may hold a waiting stream during a run."
    )
    stream_s: Seconds = Field(
        default=600.0,
        le=86_400,
        description="Longest life of a waiting stream, seconds; the device then checks in.",
    )
    offline_after: float = Field(
        default=3.0,
        ge=1.5,
        le=100,
        allow_inf_nan=False,
        description="A device is offline when it is overdue by this multiple of the interval it was given.",
    )
    batch_window_s: Seconds = Field(
        default=1.0, le=60, description="Presence and reports are written together, this often (seconds)."
    )
    journal_poll_s: Seconds = Field(
        default=0.5, le=10, description="How soon a revocation by another process is seen, seconds."
    )


class LimitsSection(_Section):
    """[limits]: what a peer may cost."""

    max_message_bytes: int = Field(
        default=65_536, ge=16_384, le=4_194_304, description="Largest request to the device service, bytes."
    )
    max_body_bytes: int = Field(
        default=536_870_912,
        ge=65_536,
        description="Largest HTTP body at the fleet port, bytes (model and update).",
    )
    max_concurrent: int = Field(
        default=256,
        ge=1,
        le=100_000,
        description="Calls served at once, waiting streams and downloads not counted; other devices are told "
        "to come at their next turn.",
    )
    calls_per_s: float = Field(
        default=20.0,
        gt=0,
        le=100_000,
        allow_inf_nan=False,
        description="Calls per second to the device port that one device may make in the long run.",
    )
    call_burst: int = Field(
        default=200, ge=1, le=1_000_000, description="Calls that one device may make at once after a rest."
    )
    max_connections: int = Field(
        default=4_096, ge=1, le=100_000, description="Connections to the fleet port at a time."
    )
    max_device_connections: int = Field(
        default=50_000,
        ge=1,
        le=1_000_000,
        description="Connections to the device port at a time; fewer where the process may not open so many "
        "files.",
    )
    max_connections_per_address: int = Field(
        default=2_048,
        ge=1,
        le=1_000_000,
        description="Connections that one address (of IPv6, a /64) may have to a port at a time, and never "
        "more than half of all. Raise it where many devices come through one proxy.",
    )
    enrolment_failures: int = Field(
        default=10,
        ge=1,
        le=100_000,
        description="Failed enrolments that one address may make per enrolment window.",
    )
    enrolment_window_s: Seconds = Field(default=60.0, le=86_400, description="The enrolment window, seconds.")
    connection_age_s: Seconds = Field(
        default=3_600.0,
        le=86_400,
        description="A kept connection is closed about so often, seconds.",
    )


class RoundsSection(_Section):
    """[rounds]: how rounds are driven."""

    max_concurrent_runs: int = Field(
        default=2, ge=1, le=16, description="Runs that train at once; others queue."
    )
    max_unread_replies: int = Field(
        default=2,
        ge=1,
        le=1_000,
        description="Replies of one round that come in at a time; others wait. Each takes as much memory "
        "as a model until it is whole: then it is on the disk.",
    )
    stay_s: float = Field(
        default=30.0,
        ge=0,
        le=3_600,
        allow_inf_nan=False,
        description="How long a device stays at the fleet port after its work: the next round comes soon.",
    )
    stage_s: Seconds = Field(
        default=60.0,
        le=86_400,
        description="Patience with each stage of secure aggregation but training, seconds.",
    )
    build_s: Seconds = Field(
        default=3_600.0,
        le=7 * 86_400,
        description="Patience with the making of a first model and with each central evaluation, seconds.",
    )


class WatchdogSection(_Section):
    """[watchdog]: what is done about devices that fail again and again."""

    quarantine_after: int = Field(
        default=3,
        ge=0,
        le=100,
        description="A device that failed so often in a row, by its own fault, is not drawn for a while; "
        "0 = never.",
    )
    quarantine_s: Seconds = Field(
        default=3_600.0,
        le=30 * 86_400,
        description="For how long, seconds; `lepton devices readmit` ends it.",
    )


class DeliverySection(_Section):
    """[delivery]: the releases that devices download."""

    folder: Path | None = Field(
        default=None,
        description="Folder of signed releases and their chunks. Empty = releases in state_dir.",
    )
    max_downloads: int = Field(
        default=32, ge=1, le=10_000, description="Downloads served at once; others stand in line."
    )
    cache_bytes: int = Field(
        default=64 * 2**20, ge=0, le=2**40, description="Memory for chunks that many devices fetch, bytes."
    )
    timestamp_days: float = Field(
        default=1.0,
        ge=1 / 1440,
        le=30,
        allow_inf_nan=False,
        description="So long a device believes the coordinator's word on what is newest, days; it is signed "
        "anew at half of that.",
    )
    snapshot_days: float = Field(
        default=7.0, ge=1 / 1440, le=90, allow_inf_nan=False, description="Life of the snapshot, days."
    )


class PrivacySection(_Section):
    """[privacy]: keys of private runs; both files have mode 0600 and are made at first need."""

    noise_key: Path | None = Field(
        default=None,
        description="File of 32 bytes that seals past rounds' noise. Empty = keys/noise.key in state_dir.",
    )
    budget_key: Path | None = Field(
        default=None,
        description="File of the P-256 key (PEM) that signs budgets. Empty = keys/budget.key in state_dir.",
    )


class LogSection(_Section):
    """[log]: what is written to standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The least severe shown."
    )
    format: Literal["text", "json"] = Field(
        default="text", description="One line for people, or one JSON object."
    )


class ServerConfig(_Section):
    """The configuration of ``lepton server``."""

    server: ServerSection = ServerSection()
    listen: ListenSection = ListenSection()
    tls: TlsSection = TlsSection()
    store: StoreSection = StoreSection()
    check_in: CheckInSection = CheckInSection()
    limits: LimitsSection = LimitsSection()
    rounds: RoundsSection = RoundsSection()
    watchdog: WatchdogSection = WatchdogSection()
    authority: AuthoritySection = AuthoritySection()
    delivery: DeliverySection = DeliverySection()
    privacy: PrivacySection = PrivacySection()
    log: LogSection = LogSection()

    @property
    def has_authority(self) -> bool:
        """Whether devices' signing keys can be certified."""
        return bool(self.authority.public_key or self.authority.key_file)

    @property
    def store_url(self) -> str:
        """The database URL, with the default filled in."""
        return self.store.url or f"sqlite:///{self.database_file}"

    @property
    def database_file(self) -> Path | None:
        """The database in the state folder; None when ``store.url`` names another."""
        return None if self.store.url else self.server.state_dir.absolute() / "lepton.db"

    @property
    def blob_dir(self) -> Path:
        """The folder of blobs, with the default filled in."""
        return self.store.blobs or self.server.state_dir / "blobs"

    @property
    def attempts_dir(self) -> Path:
        """The folder of what open attempts need; with the blobs, so that it moves with them."""
        return self.blob_dir / "attempts"

    @property
    def release_dir(self) -> Path:
        """The folder of releases, with the default filled in."""
        return self.delivery.folder or self.server.state_dir / "releases"
