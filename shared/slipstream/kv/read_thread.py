"""The thread of a transport that needs one; no READ is lost in it, whatever happens there.

What the thread knows, its sockets, connections, READs under way, is one session. An error that
nobody foresaw ends the session, never the thread: all its READs end with cause `internal`, and the
next command finds a session made anew. So nothing has to be mended that is half done.
"""

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from slipstream.kv.transport import Digests, Read, TransferError

_LOG = logging.getLogger(__name__)


class Session(Protocol):
    """Made by any thread, then used by one alone."""

    def begin(self, read: Read) -> None:
        """Its end, a refusal included, is said to `read.done`."""
        ...

    def wait(self, commands: "Commands") -> "Command | None":
        """Carry on with what is under way; the next command, if one comes meanwhile."""
        ...

    def end(self) -> None:
        """Let go of everything: from then on nobody writes into what its READs were to fill."""
        ...


AnySession = TypeVar("AnySession", bound=Session)


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """Something else to be done by the thread."""

    what: Callable[[Any], None]
    """Told the session."""
    over: Future[None]


class Close:
    """The last command."""


Command: TypeAlias = Read | Asked | Close
Commands: TypeAlias = "queue.SimpleQueue[Command]"


class ReadThread(Generic[AnySession]):
    """Each READ ends exactly once, when its session says so or with the session."""

    def __init__(
        self, name: str, make: Callable[[], AnySession], wake: Callable[[], None] = lambda: None
    ):
        """`make`: a new session; what the first one raises is raised here. `wake`: ends a `wait`
        which the queue alone does not end."""
        self._name, self._make, self._wake = name, make, wake
        self._session: AnySession | None = make()
        self._commands: Commands = queue.SimpleQueue()
        self._under_way: set[Read] = set()
        self._lock = threading.Lock()
        self._refusal: TransferError | None = None
        self._thread = threading.Thread(target=self._run, name=f"kv-{name}", daemon=True)
        self._thread.start()

    def read(self, read: Read) -> None:
        refusal = self._say(read)
        if refusal is not None:
            read.done(refusal)

    def ask(self, what: Callable[[AnySession], None]) -> Future[None]:
        """It always ends; if not well, by a TransferError."""
        over: Future[None] = Future()
        refusal = self._say(Asked(what, over))
        if refusal is not None:
            over.set_exception(refusal)
        return over

    def close(self) -> None:
        """End all READs with cause `closed`; wait for the thread. Idempotent."""
        self._say(Close(), TransferError("closed"))
        self._thread.join()

    def _say(self, command: Command, later: TransferError | None = None) -> TransferError | None:
        """Why it is refused, if it is. `later`: why all that comes after it will be."""
        with self._lock:
            refusal = self._refusal
            if refusal is None:
                self._refusal = later
                self._commands.put(command)
                self._wake()
            return refusal

    def _run(self) -> None:
        while self._live():
            pass

    def _live(self) -> bool:
        """To the end of a session; whether another may follow."""
        result, another = TransferError("closed"), False
        try:
            while not isinstance(command := self._next(), Close):
                if command is not None:
                    self._obey(command)
        except Exception as error:  # noqa: BLE001 every READ by this transport would hang
            _LOG.exception("transport %s: all its READs end here", self._name)
            result, another = _internal(error), True
        session, self._session = self._session, None
        if session is not None and not self._ended(session):
            another = False
        for read in list(self._under_way):
            self._over(read, result)
        return another

    def _next(self) -> Command | None:
        return self._commands.get() if self._session is None else self._session.wait(self._commands)

    def _obey(self, command: Read | Asked) -> None:
        if isinstance(command, Read):
            self._under_way.add(command)
            self._current().begin(replace(command, done=partial(self._over, command)))
            return
        try:
            command.what(self._current())
        except TransferError as error:
            command.over.set_exception(error)
        except Exception as error:
            command.over.set_exception(_internal(error))
            raise
        else:
            command.over.set_result(None)

    def _current(self) -> AnySession:
        if self._session is None:
            self._session = self._make()
        return self._session

    def _over(self, read: Read, result: Digests | TransferError) -> None:
        if read not in self._under_way:
            return
        self._under_way.remove(read)
        try:
            read.done(result)
        except Exception:  # noqa: BLE001 it is not this READ's, nor another's, end that failed
            _LOG.exception("transport %s: what became of a READ could not be told", self._name)

    def _ended(self, session: AnySession) -> bool:
        """A session that does not end is kept, for somebody may still write into its memory; then
        there is no other, and all READs are refused."""
        try:
            session.end()
        except Exception as error:  # noqa: BLE001 there is nothing else to be done about it
            _LOG.exception("transport %s: out of order from here on", self._name)
            self._session = session
            with self._lock:
                self._refusal = refusal = _internal(error)
            while not self._commands.empty():
                match self._commands.get():
                    case Read() as read:
                        self._under_way.add(read)
                    case Asked(_, over):
                        over.set_exception(refusal)
            return False
        return True


def _internal(error: Exception) -> TransferError:
    return TransferError("internal", f"{type(error).__name__}: {error}")
