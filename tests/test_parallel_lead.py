"""Orders from rank 0 to the others, over real sockets and an engine that only keeps books: nothing is compiled.

Planted faults this file was seen to catch, one at a time:
what the engine refused told to the others all the same; no seed drawn by rank 0; cancels not told; tokens compared by their
number alone; half a line taken for an order; ranks in a broken step told to close; strangers let in without the number.
"""
import dataclasses
import json
import socket
import threading
from types import SimpleNamespace

import pytest

from dsv3.parallel import lead, watch
from dsv3.sampling import Sampling

CFG = SimpleNamespace(vocab_size=9)


class Books:
    """The interface of ``Engine``: a request gives its own tokens back, one a step; what is asked is written down."""

    def __init__(self, asked, fails_at=None, off=0, **settings):
        self.asked, self.fails_at, self.off, self.cfg, self.max_length = asked, fails_at, off, CFG, 8
        self.asked.append(("settings", settings))
        self.left, self.number, self.steps = {}, 0, 0

    def submit(self, prompt, sampling):
        if len(prompt) >= self.max_length:
            raise ValueError("too long")
        self.number += 1
        self.left[self.number] = list(prompt)
        self.asked.append(("submit", self.number, list(prompt), sampling))
        return self.number

    def cancel(self, request):
        self.asked.append(("cancel", request))
        self.left.pop(request, None)

    def step(self):
        self.steps += 1
        if self.steps == self.fails_at:
            raise RuntimeError("planted")
        self.asked.append(("step",))
        events = [SimpleNamespace(request=n, token=tokens.pop() + self.off) for n, tokens in self.left.items()]
        self.left = {n: tokens for n, tokens in self.left.items() if tokens}
        return events

    @property
    def idle(self):
        return not self.left

    @property
    def stats(self):
        return len(self.left)


class Follower(threading.Thread):
    """A rank in a thread: its connection, what its engine was asked, and how it ended."""

    def __init__(self, **books):
        super().__init__(daemon=True)
        self.ours, self.theirs = socket.socketpair()
        self.asked, self.books, self.ended = [], books, None
        self.start()

    def run(self):
        try:
            lead.follow(lambda **settings: Books(self.asked, **self.books, **settings), self.theirs)
            self.ended = "closed"
        except (RuntimeError, OSError) as error:
            self.ended = error

    def end(self):
        self.join(10)
        assert not self.is_alive()
        return self.ended


def led(*followers, **books):
    asked = []
    settings = {"max_batch": 3, "eos_token_ids": [1]}
    return asked, lead.Lead(lambda **given: Books(asked, **books, **given), settings, [f.ours for f in followers])


def test_all_ranks_are_asked_the_same():
    """Submits with and without seeds, cancels, refusals, idle times; every field of ``Sampling`` arrives."""
    followers = Follower(), Follower()
    asked, engine = led(*followers)
    whole = Sampling(5, 1.5, 0.7, 3, 0.25, 0.125, 2**127 + 1, (4, 5), True, 2)
    assert all(getattr(whole, f.name) != f.default for f in dataclasses.fields(Sampling))
    assert engine.idle and engine.max_length == 8 and engine.cfg is CFG and engine.stats == 0
    first, second = engine.submit([1, 2, 3], whole), engine.submit((4, 5))
    with pytest.raises(ValueError, match="too long"):
        engine.submit([1] * 8)
    found = [[(event.request, event.token) for event in engine.step()]]
    third = engine.submit([6, 7, 8], Sampling(temperature=1.0))
    engine.cancel(first)
    while not engine.idle:
        found.append([(event.request, event.token) for event in engine.step()])
    engine.cancel(third)  # which is done
    assert found == [[(first, 3), (second, 5)], [(second, 4), (third, 8)], [(third, 7)], [(third, 6)]]
    engine.submit([2])
    engine.step()
    assert engine.close()
    for follower in followers:
        assert follower.end() == "closed" and follower.asked == asked
    sampled = [entry[3] for entry in asked if entry[0] == "submit"]
    assert sampled[0] == whole and all(s.seed is not None for s in sampled) and len({s.seed for s in sampled}) == 4
    assert asked[0] == ("settings", {"max_batch": 3, "eos_token_ids": [1]}) and asked.count(("step",)) == 5


def test_nothing_is_sent_while_there_is_nothing_to_do():
    ours, theirs = socket.socketpair()
    engine = lead.Lead(lambda **settings: Books([], **settings), {}, [ours])
    theirs.settimeout(5)
    assert json.loads(theirs.recv(99)) == {"settings": {}}
    engine.submit([1])
    engine.cancel(1)
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        theirs.recv(1)


def test_a_rank_that_computes_something_else_ends_before_it_does_harm():
    wrong, right = Follower(off=1), Follower()
    asked, engine = led(wrong, right)
    engine.submit([1, 2, 3])
    engine.step()
    engine.step()
    error = wrong.end()
    assert isinstance(error, RuntimeError) and "found the tokens [4] where rank 0 found [3]" in str(error)
    assert wrong.asked.count(("step",)) == 1
    engine.close()
    assert right.end() == "closed"


def test_the_end_of_rank_0_is_no_order_to_close():
    for cut_off in (b"", b'{"close":tr', b'{"close":true}'):
        follower = Follower()
        follower.ours.sendall(b'{"settings":{}}\n' + cut_off)
        follower.ours.close()
        assert isinstance(follower.end(), ConnectionError)


def test_ranks_inside_of_a_broken_step_are_left_to_the_watch():
    follower = Follower()
    _, engine = led(follower, fails_at=2)
    engine.submit([1, 2, 3])
    engine.step()
    with pytest.raises(RuntimeError, match="planted"):
        engine.step()
    assert not engine.close()
    follower.ours.close()
    assert isinstance(follower.end(), ConnectionError)


def test_a_rank_that_has_gone_is_named():
    one, other = Follower(), Follower()
    _, engine = led(one, other)
    engine.submit([1, 2, 3])
    engine.step()
    other.theirs.shutdown(socket.SHUT_RDWR)
    other.end()
    with pytest.raises(ConnectionError, match="rank 2 cannot be told") as caught:
        engine.step()
    assert not isinstance(caught.value, BrokenPipeError)  # which the command line takes for a closed pipe, and a success


def test_only_ranks_of_this_run_are_let_in():
    """Strangers say nothing, something else, a wrong number, or a rank that is not; ranks come in any order."""
    server = watch.listen()
    address = ("127.0.0.1", server.getsockname()[1])
    said = (None, b"GET / HTTP/1.1\r\n\r\n", lead.HELLO.pack(1, 8), lead.HELLO.pack(3, 7), lead.HELLO.pack(0, 7),
            lead.HELLO.pack(2, 7), lead.HELLO.pack(1, 7))
    callers = []
    for words in said:
        callers.append(socket.create_connection(address, timeout=5))
        if words:
            callers[-1].sendall(words)
    callers[0].close()
    first, second = lead.accept(server, 3, 7, patience=10)
    first.sendall(b"1")
    second.sendall(b"2")
    assert callers[-1].recv(1) == b"1" and callers[-2].recv(1) == b"2"
    for stranger in callers[1:-2]:
        try:
            assert stranger.recv(1) == b""
        except ConnectionResetError:  # it had said more than was read
            continue
    with pytest.raises(ConnectionError, match="rank 1, 2 did not connect to rank 0 within 0.2 s"):
        lead.accept(server, 3, 7, patience=0.2)
    server.close()
