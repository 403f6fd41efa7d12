"""CURVE on every TCP socket of ours: who is let in, and as what.

Each role has a key pair. A process knows its own secret and the public keys of all roles: it takes
part only with peers that hold one of these, believes a peer to be of the role whose key it has
shown, and speaks only to a socket that holds the key of the role that it is addressed as. In a
folder of keys, `<role>/` is what a process of that role needs and all it should get:

    <role>/secret            its secret key, mode 0400
    <role>/<any role>.public the public keys, one for each role

Source: "ironhouse" of ZeroMQ's guide; CurveCP, Bernstein, 2011.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import zmq
from zmq.auth.thread import ThreadAuthenticator

from slipstream.config import SetupError
from slipstream.types import NodeId, Role, role_of

SECRET = "secret"
PUBLIC_SUFFIX = ".public"
KEY_BYTES = 40
"""Of a key as it is written: 32 bytes in Z85."""
_DOMAIN = "slipstream"
_REFUSED_MAX = 1000
"""So many keys that are nobody's are remembered, so that each is spoken of once."""

Socket: TypeAlias = zmq.Socket[Any]

_LOG = logging.getLogger(__name__)


class Keys(NamedTuple):
    """What one process holds."""

    secret: bytes
    public: Mapping[Role, bytes]
    role: Role

    def serve(self, socket: Socket) -> None:
        """Before a bind: the socket is for those alone whom the context's `Door` lets in."""
        socket.set(zmq.ZAP_DOMAIN, _DOMAIN.encode())
        socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a door nobody comes in
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_SECRETKEY, self.secret)

    def approach(self, socket: Socket, peer: NodeId) -> None:
        """Before a connect: the socket speaks to a holder of the key of `peer`'s role alone.

        ZMQError: the name is not one of a role.
        """
        role = role_of(peer)
        if role is None:
            raise zmq.ZMQError(zmq.EINVAL, f"{peer} is not named after a role")
        socket.set(zmq.CURVE_SERVERKEY, self.public[role])
        socket.set(zmq.CURVE_PUBLICKEY, self.public[self.role])
        socket.set(zmq.CURVE_SECRETKEY, self.secret)


class Door:
    """Lets holders of a key in at the serving sockets of one context, and names their roles.

    To be there before they bind, and closed before the context is.
    """

    def __init__(self, context: zmq.Context[Any], keys: Keys) -> None:
        self._roles = {key: role for role, key in keys.public.items()}
        self._refused: set[bytes] = set()
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.configure_curve_callback(_DOMAIN, self)
        self._authenticator.start()

    def callback(self, domain: str, key: bytes) -> bool:
        """pyzmq's question, from its own thread."""
        if key in self._roles:
            return True
        if len(self._refused) < _REFUSED_MAX and key not in self._refused:
            self._refused.add(key)
            _LOG.warning("refused a connection: its key is nobody's here")
        return False

    def sender(self, frame: zmq.Frame) -> Role:
        """Whose key the peer has shown that sent this frame."""
        return self._roles[str(frame.get("User-Id")).encode()]

    def close(self) -> None:
        self._authenticator.stop()


def load(folder: str, role: Role) -> Keys | None:
    """The keys of a process, None without a folder. SetupError: they are not all there, or others
    can read the secret."""
    if not folder:
        return None
    own = Path(folder) / role
    return Keys(
        _read(own / SECRET, secret=True),
        {each: _read(own / f"{each}{PUBLIC_SUFFIX}") for each in Role},
        role,
    )


def _read(path: Path, secret: bool = False) -> bytes:
    try:
        if secret and path.stat().st_mode & 0o077:
            raise SetupError(f"slipstream: --keys-dir: {path} can be read by others; chmod 400 it")
        key = path.read_bytes().strip()
    except OSError as error:
        raise SetupError(
            f"slipstream: --keys-dir: {path}: {error.strerror}; make them: slipstream keys make"
        ) from None
    if len(key) != KEY_BYTES:
        raise SetupError(f"slipstream: --keys-dir: {path}: {len(key)} bytes, a key has {KEY_BYTES}")
    return key


def generate(folder: Path) -> bool:
    """Writes the keys of all roles; False if they are there already.

    SetupError: some of them are, or the folder cannot be written.
    """
    paths = [folder / role / SECRET for role in Role]
    there = [path for path in paths if path.exists()]
    if len(there) == len(paths):
        return False
    if there:
        raise SetupError(
            f"slipstream keys make: {there[0]} is there, keys of other roles are not; "
            "take an empty folder, or remove these"
        )
    pairs = {role: zmq.curve_keypair() for role in Role}
    try:
        for role, (_, secret) in pairs.items():
            own = folder / role
            own.mkdir(mode=0o755, parents=True, exist_ok=True)
            for other, (public, _) in pairs.items():
                (own / f"{other}{PUBLIC_SUFFIX}").write_bytes(public + b"\n")
            descriptor = os.open(own / SECRET, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secret + b"\n")
    except OSError as error:
        raise SetupError(f"slipstream keys make: {error.filename}: {error.strerror}") from None
    return True
