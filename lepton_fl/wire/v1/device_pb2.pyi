from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATUS_UNSPECIFIED: _ClassVar[Status]
    STATUS_IDLE: _ClassVar[Status]
    STATUS_BUSY: _ClassVar[Status]
    STATUS_NOT_ELIGIBLE: _ClassVar[Status]
STATUS_UNSPECIFIED: Status
STATUS_IDLE: Status
STATUS_BUSY: Status
STATUS_NOT_ELIGIBLE: Status

class EnrollRequest(_message.Message):
    __slots__ = ("protocol", "token_secret", "csr_pem", "name", "groups")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_SECRET_FIELD_NUMBER: _ClassVar[int]
    CSR_PEM_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    token_secret: bytes
    csr_pem: bytes
    name: str
    groups: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, protocol: _Optional[int] = ..., token_secret: _Optional[bytes] = ..., csr_pem: _Optional[bytes] = ..., name: _Optional[str] = ..., groups: _Optional[_Iterable[str]] = ...) -> None: ...

class EnrollResponse(_message.Message):
    __slots__ = ("device_id", "certificate_pem", "ca_pem", "endpoints")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    CA_PEM_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    certificate_pem: bytes
    ca_pem: bytes
    endpoints: Endpoints
    def __init__(self, device_id: _Optional[str] = ..., certificate_pem: _Optional[bytes] = ..., ca_pem: _Optional[bytes] = ..., endpoints: _Optional[_Union[Endpoints, _Mapping]] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("protocol", "device_id", "csr_pem", "cause")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    CSR_PEM_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    device_id: str
    csr_pem: bytes
    cause: str
    def __init__(self, protocol: _Optional[int] = ..., device_id: _Optional[str] = ..., csr_pem: _Optional[bytes] = ..., cause: _Optional[str] = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("certificate_pem", "endpoints")
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    certificate_pem: bytes
    endpoints: Endpoints
    def __init__(self, certificate_pem: _Optional[bytes] = ..., endpoints: _Optional[_Union[Endpoints, _Mapping]] = ...) -> None: ...

class Endpoints(_message.Message):
    __slots__ = ("device_service", "fleet")
    DEVICE_SERVICE_FIELD_NUMBER: _ClassVar[int]
    FLEET_FIELD_NUMBER: _ClassVar[int]
    device_service: str
    fleet: str
    def __init__(self, device_service: _Optional[str] = ..., fleet: _Optional[str] = ...) -> None: ...

class TaskReport(_message.Message):
    __slots__ = ("name", "version", "layout_digest", "ready", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    layout_digest: str
    ready: bool
    reason: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., layout_digest: _Optional[str] = ..., ready: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class CheckInRequest(_message.Message):
    __slots__ = ("protocol", "status", "reason", "tasks", "client_version", "capabilities", "device_time", "desired_digest", "serving", "credential_ends", "adverts", "advert_session", "service", "ledger", "trial", "troubles", "engaged")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_TIME_FIELD_NUMBER: _ClassVar[int]
    DESIRED_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    CREDENTIAL_ENDS_FIELD_NUMBER: _ClassVar[int]
    ADVERTS_FIELD_NUMBER: _ClassVar[int]
    ADVERT_SESSION_FIELD_NUMBER: _ClassVar[int]
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    TRIAL_FIELD_NUMBER: _ClassVar[int]
    TROUBLES_FIELD_NUMBER: _ClassVar[int]
    ENGAGED_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    status: Status
    reason: str
    tasks: _containers.RepeatedCompositeFieldContainer[TaskReport]
    client_version: str
    capabilities: Capabilities
    device_time: float
    desired_digest: str
    serving: Serving
    credential_ends: int
    adverts: _containers.RepeatedScalarFieldContainer[bytes]
    advert_session: bytes
    service: Service
    ledger: LedgerHead
    trial: Trial
    troubles: _containers.RepeatedCompositeFieldContainer[Trouble]
    engaged: _containers.RepeatedCompositeFieldContainer[Engaged]
    def __init__(self, protocol: _Optional[int] = ..., status: _Optional[_Union[Status, str]] = ..., reason: _Optional[str] = ..., tasks: _Optional[_Iterable[_Union[TaskReport, _Mapping]]] = ..., client_version: _Optional[str] = ..., capabilities: _Optional[_Union[Capabilities, _Mapping]] = ..., device_time: _Optional[float] = ..., desired_digest: _Optional[str] = ..., serving: _Optional[_Union[Serving, _Mapping]] = ..., credential_ends: _Optional[int] = ..., adverts: _Optional[_Iterable[bytes]] = ..., advert_session: _Optional[bytes] = ..., service: _Optional[_Union[Service, _Mapping]] = ..., ledger: _Optional[_Union[LedgerHead, _Mapping]] = ..., trial: _Optional[_Union[Trial, _Mapping]] = ..., troubles: _Optional[_Iterable[_Union[Trouble, _Mapping]]] = ..., engaged: _Optional[_Iterable[_Union[Engaged, _Mapping]]] = ...) -> None: ...

class Engaged(_message.Message):
    __slots__ = ("run_id", "round", "nonce", "failure")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    round: int
    nonce: str
    failure: str
    def __init__(self, run_id: _Optional[str] = ..., round: _Optional[int] = ..., nonce: _Optional[str] = ..., failure: _Optional[str] = ...) -> None: ...

class Trial(_message.Message):
    __slots__ = ("release", "question", "word")
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    WORD_FIELD_NUMBER: _ClassVar[int]
    release: str
    question: str
    word: str
    def __init__(self, release: _Optional[str] = ..., question: _Optional[str] = ..., word: _Optional[str] = ...) -> None: ...

class LedgerHead(_message.Message):
    __slots__ = ("seq", "hash", "key", "signature")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    seq: int
    hash: bytes
    key: bytes
    signature: bytes
    def __init__(self, seq: _Optional[int] = ..., hash: _Optional[bytes] = ..., key: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Trouble(_message.Message):
    __slots__ = ("cause", "detail")
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    cause: str
    detail: str
    def __init__(self, cause: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class Service(_message.Message):
    __slots__ = ("release", "requests", "errors", "p95_ms")
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    P95_MS_FIELD_NUMBER: _ClassVar[int]
    release: str
    requests: int
    errors: int
    p95_ms: float
    def __init__(self, release: _Optional[str] = ..., requests: _Optional[int] = ..., errors: _Optional[int] = ..., p95_ms: _Optional[float] = ...) -> None: ...

class Serving(_message.Message):
    __slots__ = ("task", "profile", "release", "failed", "trials")
    TASK_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    TRIALS_FIELD_NUMBER: _ClassVar[int]
    task: str
    profile: str
    release: str
    failed: _containers.RepeatedCompositeFieldContainer[FailedRelease]
    trials: bool
    def __init__(self, task: _Optional[str] = ..., profile: _Optional[str] = ..., release: _Optional[str] = ..., failed: _Optional[_Iterable[_Union[FailedRelease, _Mapping]]] = ..., trials: _Optional[bool] = ...) -> None: ...

class FailedRelease(_message.Message):
    __slots__ = ("release", "fault", "detail", "final")
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    release: str
    fault: str
    detail: str
    final: bool
    def __init__(self, release: _Optional[str] = ..., fault: _Optional[str] = ..., detail: _Optional[str] = ..., final: _Optional[bool] = ...) -> None: ...

class Capabilities(_message.Message):
    __slots__ = ("cpus", "memory_bytes", "accelerator", "os")
    CPUS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_FIELD_NUMBER: _ClassVar[int]
    OS_FIELD_NUMBER: _ClassVar[int]
    cpus: int
    memory_bytes: int
    accelerator: str
    os: str
    def __init__(self, cpus: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., accelerator: _Optional[str] = ..., os: _Optional[str] = ...) -> None: ...

class CheckInResponse(_message.Message):
    __slots__ = ("next_check_in_s", "wait", "server_time", "instructions", "renew", "desired_json", "certify", "adverts_wanted", "ledger")
    NEXT_CHECK_IN_S_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    SERVER_TIME_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTIONS_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    DESIRED_JSON_FIELD_NUMBER: _ClassVar[int]
    CERTIFY_FIELD_NUMBER: _ClassVar[int]
    ADVERTS_WANTED_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    next_check_in_s: float
    wait: bool
    server_time: float
    instructions: _containers.RepeatedCompositeFieldContainer[Instruction]
    renew: bool
    desired_json: str
    certify: bool
    adverts_wanted: int
    ledger: LedgerHead
    def __init__(self, next_check_in_s: _Optional[float] = ..., wait: _Optional[bool] = ..., server_time: _Optional[float] = ..., instructions: _Optional[_Iterable[_Union[Instruction, _Mapping]]] = ..., renew: _Optional[bool] = ..., desired_json: _Optional[str] = ..., certify: _Optional[bool] = ..., adverts_wanted: _Optional[int] = ..., ledger: _Optional[_Union[LedgerHead, _Mapping]] = ...) -> None: ...

class CertifyRequest(_message.Message):
    __slots__ = ("protocol", "request")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    request: bytes
    def __init__(self, protocol: _Optional[int] = ..., request: _Optional[bytes] = ...) -> None: ...

class CertifyResponse(_message.Message):
    __slots__ = ("authority", "credential")
    AUTHORITY_FIELD_NUMBER: _ClassVar[int]
    CREDENTIAL_FIELD_NUMBER: _ClassVar[int]
    authority: bytes
    credential: bytes
    def __init__(self, authority: _Optional[bytes] = ..., credential: _Optional[bytes] = ...) -> None: ...

class WaitRequest(_message.Message):
    __slots__ = ("protocol",)
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    def __init__(self, protocol: _Optional[int] = ...) -> None: ...

class Instruction(_message.Message):
    __slots__ = ("participate", "verdict", "leave", "ping")
    PARTICIPATE_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    participate: Participate
    verdict: Verdict
    leave: Leave
    ping: Ping
    def __init__(self, participate: _Optional[_Union[Participate, _Mapping]] = ..., verdict: _Optional[_Union[Verdict, _Mapping]] = ..., leave: _Optional[_Union[Leave, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ...) -> None: ...

class Participate(_message.Message):
    __slots__ = ("run_id", "round", "attempt", "kind", "task", "task_version", "deadline_s", "stay_s", "node_id", "nonce", "resumed")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    TASK_VERSION_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    STAY_S_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    round: int
    attempt: int
    kind: str
    task: str
    task_version: str
    deadline_s: float
    stay_s: float
    node_id: int
    nonce: str
    resumed: bool
    def __init__(self, run_id: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., kind: _Optional[str] = ..., task: _Optional[str] = ..., task_version: _Optional[str] = ..., deadline_s: _Optional[float] = ..., stay_s: _Optional[float] = ..., node_id: _Optional[int] = ..., nonce: _Optional[str] = ..., resumed: _Optional[bool] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("run_id", "round", "attempt", "accepted", "reason", "detail", "kind")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    round: int
    attempt: int
    accepted: bool
    reason: str
    detail: str
    kind: str
    def __init__(self, run_id: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., accepted: _Optional[bool] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ..., kind: _Optional[str] = ...) -> None: ...

class Leave(_message.Message):
    __slots__ = ("run_id", "round", "attempt", "kind", "nonce")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    round: int
    attempt: int
    kind: str
    nonce: str
    def __init__(self, run_id: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., kind: _Optional[str] = ..., nonce: _Optional[str] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FetchMetadataRequest(_message.Message):
    __slots__ = ("protocol", "name")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    name: str
    def __init__(self, protocol: _Optional[int] = ..., name: _Optional[str] = ...) -> None: ...

class FetchMetadataResponse(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class FetchChunksRequest(_message.Message):
    __slots__ = ("protocol", "sha256")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    sha256: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, protocol: _Optional[int] = ..., sha256: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class Along(_message.Message):
    __slots__ = ("objects",)
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    objects: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, objects: _Optional[_Iterable[bytes]] = ...) -> None: ...
