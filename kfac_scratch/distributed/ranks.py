"""The ranks of a job: collectives that have a name, are counted, and say who is missing.

Every collective begins with an exchange of a few numbers on the CPU: what a rank is about to do,
and whether it failed. So

- if one rank has refused its batch, all raise the same error, which names the rank;
- if ranks call different methods, all raise, and say who is where;
- if a rank is gone or hangs, the exchange fails after the time-out, and the error names the rank.

PyTorch's own errors name neither rank nor collective, and its default time-out is 30 minutes.

Source: PyTorch's documentation of `torch.distributed` (`all_gather`, `TCPStore`).
"""

import os
import pickle
import socket
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from kfac_scratch.distributed.packing import through
from kfac_scratch.optimizer.placement import AgreedError, LostRankError

WIDTH = 8  # numbers in an exchange: refused, what, step, count, and up to four more


class Ranks:
    """All processes of `torch.distributed`, as one of them sees them.

    Use it by `distribute`, which makes one. Not for groups of only some processes.

    Cost: an exchange of 64 bytes before every collective that all ranks join.

    Attributes:
        rank: The number of this process, from 0 on.
        size: The number of processes.
        sent: The entries of tensors that this rank gave to collectives, by their names.
        step: The number of the current step, for messages.
    """

    def __init__(self, timeout: float = 60.0, diagnosis: float = 5.0) -> None:
        """Make the groups for tensors and for exchanges, and find the board.

        Args:
            timeout: Seconds that a rank waits for the others.
            diagnosis: Seconds for finding out who is missing, after a time-out.

        Raises:
            ValueError: If `torch.distributed` is not initialised, or a number is not positive.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "torch.distributed is not initialised: start the script with torchrun, and call "
                "torch.distributed.init_process_group() first."
            )
        if not (timeout > 0 and diagnosis > 0):
            raise ValueError(
                f"timeout and diagnosis are seconds, got {timeout} and {diagnosis}: both must be "
                "positive."
            )
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.timeout, self.diagnosis = timeout, diagnosis
        self.sent: Counter[str] = Counter()
        self.step = 0
        self._count = 0
        self._board: Board | None = None
        limit = timedelta(seconds=timeout)
        try:
            self._data = dist.new_group(timeout=limit)
            self._control = dist.new_group(backend="gloo", timeout=limit)
            self._made = [self._data, self._control]
            self._board = self._connected()
            dist.barrier(self._data)  # connections are made at the first use
        except RuntimeError as error:
            raise LostRankError(
                f"Rank {self.rank} of {self.size} could not connect to all others: did every rank "
                f"call distribute()? {str(error).splitlines()[0]}"
            ) from error

    def close(self) -> None:
        """Give up the groups. No collective is possible afterwards."""
        for group in reversed(self._made):
            dist.destroy_process_group(group)
        self._made = []

    def _connected(self) -> "Board":
        """The board of the job, which rank 0 keeps: one for all optimizers."""
        if _board_of and _board_of[0][0] is dist.group.WORLD:
            return _board_of[0][1]
        times, name = (self.diagnosis, self.timeout), socket.gethostname()
        given = os.environ.get("MASTER_ADDR")
        near = given or "127.0.0.1"
        board = Board(self.rank, self.size, near, 0, *times) if self.rank == 0 else None
        where = self._objects("connection", (name, board and board.port))
        (there, port), one_machine = where[0], len({host for host, _ in where}) == 1
        host = near if one_machine or given else there
        board = board or Board(self.rank, self.size, host, port, *times)
        _board_of[:] = [(dist.group.WORLD, board)]
        return board

    # ---- coming together ----------------------------------------------------------------------

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Work after which all ranks go on, or all raise what one of them raised.

        Raises:
            AgreedError: On all ranks, naming the one that raised, and its error.
            LostRankError: If a rank does not come.
        """
        try:
            yield
        except (AgreedError, LostRankError):
            raise
        except Exception as error:
            self.exchange(what, error=error)
            raise
        self.exchange(what)

    def exchange(
        self, what: str, numbers: Sequence[float] = (), error: Exception | None = None
    ) -> Tensor:
        """Tell all ranks what this one is about to do, and some numbers; get theirs.

        Args:
            what: The name of what follows, the same on all ranks.
            numbers: Up to four numbers.
            error: The reason why this rank refuses.

        Returns:
            A row of numbers for every rank.

        Raises:
            AgreedError: If a rank refuses, or the names differ.
            LostRankError: If a rank does not come.
        """
        self._count += 1
        place = (crc32(what.encode()), self.step, self._count)  # the same on all ranks
        head = [float(number) for number in (error is not None, *place, *numbers)]
        mine = torch.tensor(head + [0.0] * (WIDTH - len(head)), dtype=torch.float64)
        table = torch.empty(self.size, WIDTH, dtype=torch.float64)
        if self._board is not None:
            self._board.exchanges += 1
        with self._named(what):
            dist.all_gather(list(table.unbind()), mine, group=self._control)
        self.sent["control"] += WIDTH
        if table[:, 0].any() or (table[:, 1:4] != table[0, 1:4]).any():
            self._refuse(what, error)
        return table[:, 4 : 4 + len(numbers)]

    def _refuse(self, what: str, error: Exception | None) -> None:
        """Raise the same on all ranks."""
        said = None if error is None else f"{type(error).__name__}: {error}"
        places = self._objects(what, (f"{what!r} of step {self.step}", said))
        self._count = max(self._objects(what, self._count))  # from here on, all go on together
        for rank, (place, reason) in enumerate(places):
            if reason is not None:
                raise AgreedError(
                    f"Rank {rank} of {self.size} refused in {place}; nothing was changed on any "
                    f"rank. {reason}"
                ) from error
        raise AgreedError(
            "The ranks are at different places: "
            + ", ".join(f"rank {r} at {place}" for r, (place, _) in enumerate(places))
            + ". All ranks must call observe, step, state_dict and load_state_dict in the same "
            "order, and as often."
        )

    def objects(self, what: str, value: Any) -> list[Any]:
        """The value of every rank. Any Python object that can be pickled.

        Raises:
            AgreedError: If a rank has refused before it came here.
            LostRankError: If a rank does not come.
        """
        pickled = pickle.dumps(value)  # what cannot be pickled raises before the others wait
        self.exchange(what)
        return [pickle.loads(each) for each in self._objects(what, pickled)]

    def _objects(self, what: str, value: Any) -> list[Any]:
        """The same where all ranks are known to be here."""
        values: list[Any] = [None] * self.size
        with self._named(what):
            dist.all_gather_object(values, value, group=self._control)
        return values

    def check_same(self, what: str, items: Sequence[tuple[str, Any]]) -> None:
        """Refuse ranks that differ in a list of names and values.

        Raises:
            AgreedError: Naming the first item that differs, both values and both ranks.
        """
        everywhere = self.objects(what, list(items))
        end = ("the end of the list", None)
        for rank, others in enumerate(everywhere):
            longest = max(len(others), len(everywhere[0]))
            pairs = zip(
                *(each + [end] * (longest - len(each)) for each in (everywhere[0], others)),
                strict=True,
            )
            for (name, value), (other_name, other) in pairs:
                if (name, value) != (other_name, other):
                    raise AgreedError(
                        f"The ranks differ in {what}: rank 0 has {name}: {value}, but rank {rank} "
                        f"has {other_name}: {other}. Build and change model and optimizer in the "
                        "same way on all ranks, from the same seed or checkpoint."
                    )

    @property
    def everyone(self) -> Any:
        """The group of all ranks, for tensors."""
        return self._data

    # ---- tensors ------------------------------------------------------------------------------

    def summed(self, what: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum of every tensor over all ranks. The tensors themselves stay as they are.

        Raises:
            AgreedError: If the ranks have tensors of other numbers, shapes or dtypes.
        """
        forms = [(tuple(t.shape), str(t.dtype)) for t in tensors]
        table = self.exchange(what, [crc32(str(forms).encode())])
        if (table != table[0]).any():
            raise AgreedError(
                f"The ranks have different layers in {what!r} of step {self.step}: freeze, "
                "unfreeze and add parameters on all of them, before the same batch."
            )
        return through(tensors, self._counted(what, self._added))

    def _added(self, flat: Tensor) -> None:
        dist.all_reduce(flat, group=self._data)

    def sent_from(
        self, what: str, tensors: Sequence[Tensor], source: int, group: Any
    ) -> list[Tensor]:
        """The tensors of one rank, on all ranks of a group.

        Without an exchange: `exchange` before the first of several.

        Args:
            what: The name.
            tensors: On the source, what it sends; elsewhere, tensors of the same shapes.
            source: The rank that sends.
            group: The group, None if this rank is alone.
        """
        if group is None:
            return list(tensors)

        def transmit(flat: Tensor) -> None:
            dist.broadcast(flat, source, group=group)

        return through(tensors, self._counted(what, transmit))

    def gathered(self, what: str, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all ranks, in the order of the ranks.

        Args:
            what: The name.
            rows: The rows here.
            counts: The number of rows on every rank.
        """
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        everywhere = [torch.empty_like(padded) for _ in counts]

        def transmit(flat: Tensor) -> None:
            dist.all_gather(everywhere, flat, group=self._data)

        self._counted(what, transmit)(padded)
        parts = zip(everywhere, counts, strict=True)
        return torch.cat([part[:count] for part, count in parts])

    def groups(self, members: Sequence[Sequence[int]]) -> list[Any]:
        """A group for each list of ranks, None for those that this rank is not in, or alone in.

        All ranks make all groups, in the same order, and use theirs once.
        """
        limit = timedelta(seconds=self.timeout)
        made: list[Any] = []
        for ranks in members:
            if len(ranks) == self.size:
                made.append(self._data)
                continue
            group = dist.new_group(list(ranks), timeout=limit) if len(ranks) > 1 else None
            made.append(group if self.rank in ranks else None)
            self._made += [group] if made[-1] is not None else []
        for group in made:
            if group is not None:
                dist.barrier(group)
        return made

    def _counted(self, what: str, transmit: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        """A collective that counts entries, and gives its errors a name."""

        def counted(flat: Tensor) -> None:
            with self._named(what):
                transmit(flat)
            self.sent[what] += flat.numel()

        return counted

    # ---- failures -----------------------------------------------------------------------------

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """A collective whose errors name it, and the rank that is missing."""
        self._write(what)
        begun = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            waited = time.monotonic() - begun
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise LostRankError(
                f"Rank {self.rank} of {self.size}: {what!r} of step {self.step} failed after "
                f"{waited:.1f} s. {self._missing()} [{cause}]"
            ) from error

    def _write(self, what: str) -> None:
        """Tell the others where this rank is, for their error messages."""
        if self._board is not None:
            self._board.write(f"'{what}' of step {self.step}")

    def _missing(self) -> str:
        """A sentence about who is missing."""
        if self._board is None:
            return "The ranks were still connecting."
        return self._board.missing()


class Board:
    """A place where every rank writes its position and a sign of life. Rank 0 keeps it.

    Use it to find out who is missing when a collective has failed: who lags behind, or does not
    give a sign of life any more. Not for anything that a step needs.

    Cost: a message of a few bytes for every collective, and four for every diagnosis's time.

    Attributes:
        exchanges: The number of exchanges so far, which is the same on all ranks that live.
        port: The port of rank 0.
    """

    def __init__(
        self, rank: int, size: int, host: str, port: int, seconds: float, patience: float
    ) -> None:
        """Open the board, or connect to it. It has many parameters, because both need all of them.

        Args:
            rank: The number of this process. Rank 0 opens the board.
            size: The number of processes.
            host: The address of rank 0.
            port: The port there; 0 to choose one.
            seconds: The time that a diagnosis takes.
            patience: The time that other ranks need to notice that something is wrong.
        """
        make: Any = dist.TCPStore  # type: ignore[attr-defined]
        limit = timedelta(seconds=seconds)
        self.rank, self.size, self.seconds, self.patience = rank, size, seconds, patience
        self._store = make(host, port, None, rank == 0, limit, False)
        self.port: int = self._store.port
        self.exchanges = 0
        self.write("the beginning")
        over = threading.Event()
        signs = make(host, self.port, None, False, limit, False)  # a connection of its own
        signs.set(f"sign of {rank}", "0")
        thread = threading.Thread(
            target=_give_signs, args=(signs, rank, over, seconds / SIGNS), daemon=True
        )
        thread.start()
        weakref.finalize(self, _end, over, thread)

    def write(self, place: str) -> None:
        """Write the number of the exchange that this rank is in, and its name."""
        with suppress(RuntimeError):  # rank 0 is gone, which the collective will notice
            self._store.set(f"place of {self.rank}", f"{self.exchanges}|{place}")

    def missing(self) -> str:
        """A sentence about who has not arrived here, or has given no sign of life.

        The first rank that finds out writes it on the board, since others may end before the rest
        has noticed. So rank 0, which keeps the board, waits for the rest.
        """
        verdicts: list[str] = []
        examination = threading.Thread(  # the connection to a stopped process may never return
            target=lambda: verdicts.append(self._verdict()), daemon=True
        )
        examination.start()
        examination.join(self.seconds + SLACK)
        if verdicts and self.rank == 0:
            self._wait_for_the_rest(verdicts[0])
        return verdicts[0] if verdicts else RANK_0_IS_GONE

    def _verdict(self) -> str:
        try:
            found = self._written() or self._examined()
            found = self._written() or found
            self._store.set("verdict", found)
            self._store.set(f"told {self.rank}", "")
        except RuntimeError:
            return RANK_0_IS_GONE
        return found

    def _written(self) -> str:
        known = self._store.check(["verdict"])
        return self._store.get("verdict").decode() if known else ""

    def _examined(self) -> str:
        before = self._read("sign")
        time.sleep(self.seconds)
        after, places = self._read("sign"), self._read("place")
        dead, late = [], []
        for rank, (sign, later, place) in enumerate(zip(before, after, places, strict=True)):
            number, _, name = place.partition("|")
            if sign == later:
                dead.append(f"Rank {rank} gives no sign of life (last seen in {name}).")
            elif int(number) < self.exchanges:
                late.append(f"Rank {rank} has not arrived (last seen in {name}).")
        missing = dead or late  # those who are late may wait for the dead
        return " ".join(missing) or "All ranks are there: one was too slow, or the network was."

    def _wait_for_the_rest(self, verdict: str) -> None:
        """Keep the board until all ranks that live have read it, or their time is over."""
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            before = self._read("sign")
            time.sleep(self.seconds)
            after = self._read("sign")
            alive = [r for r in range(self.size) if before[r] != after[r]]
            alive = [rank for rank in alive if f"Rank {rank} " not in verdict]  # which may hang
            if all(self._store.check([f"told {rank}"]) for rank in alive):
                return

    def _read(self, what: str) -> list[str]:
        return [self._store.get(f"{what} of {rank}").decode() for rank in range(self.size)]


_board_of: list[tuple[Any, Board]] = []  # the group of all processes, and its board
SIGNS = 4  # signs of life within one diagnosis
SLACK = 3.0  # seconds more than a diagnosis, for a connection that does not return
RANK_0_IS_GONE = "Rank 0 does not answer: it has ended, or is stopped."


def _give_signs(store: Any, rank: int, over: threading.Event, pause: float) -> None:
    """Count on the board, until the board is not needed any more or is gone."""
    count = 0
    while not over.wait(pause) and dist.is_initialized():
        count += 1
        try:
            store.set(f"sign of {rank}", str(count))
        except RuntimeError:
            return


def _end(over: threading.Event, thread: threading.Thread) -> None:
    over.set()
    thread.join(1.0)
