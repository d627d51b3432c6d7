"""A hostile message cannot execute anything, nor allocate without bound: what arrives at real NVFlare processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from nvflare.fuel.f3.cellnet.defs import Encoding, MessageHeaderKey
from nvflare.fuel.f3.cellnet.registry import Callback, Registry
from nvflare.fuel.f3.message import Message

from fedlm.federation.engines.flare import site
from fedlm.federation.engines.flare.envelope import MAX_MESSAGE
from fedlm.federation.engines.flare.start import relay
from tests.federation.flare.parties import connected, demo_network, edit, log_of, seen, until

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("encoding", "size", "passes"),
    [
        (Encoding.BYTES, 10, True),
        (Encoding.NONE, 0, True),
        (Encoding.BYTES, MAX_MESSAGE, True),
        (Encoding.BYTES, MAX_MESSAGE + 1, False),
        (Encoding.FOBS, 10, False),
        ("pickle", 10, False),
        (None, 10, False),
    ],
)
def test_only_plain_bytes_of_bounded_size_pass(encoding: str | None, size: int, passes: bool) -> None:
    message = Message({MessageHeaderKey.PAYLOAD_ENCODING: encoding}, bytes(size) if size else None)
    assert (site._raw_only(message) is None) is passes


def test_a_silo_hears_the_coordinator_alone() -> None:
    heard: list[bytes] = []

    class Relay:
        def handle(self, message: bytes) -> bytes:
            heard.append(message)
            return b"answer"

    component = site.SiloRelay()
    component._relay = Relay()
    for origin in ("hospital-a", "server.job", "admin", None):
        reply = component._answer(Message({MessageHeaderKey.ORIGIN: origin}, b"x"))
        assert reply.get_header(MessageHeaderKey.RETURN_CODE) != "ok" and reply.payload is None
    assert not heard
    assert component._answer(Message({MessageHeaderKey.ORIGIN: "server"}, b"x")).payload == b"answer"


def test_nvflares_own_filters_are_asked_on_our_channel_too() -> None:
    """NVFlare asks the filters of a channel in place of those of all channels, such as its authentication."""

    class Core:
        in_filter_reg = Registry()

        def add_incoming_filter(self, channel: str, topic: str, cb: Any, *args: Any, **kwargs: Any) -> None:
            self.in_filter_reg.append(channel, topic, Callback(cb, args, kwargs))

    core = Core()
    core.add_incoming_filter("*", "*", authenticate := lambda _: None)
    site._guard(core)
    asked = [f.cb for f in core.in_filter_reg.find(site.CHANNEL, site.TOPIC)]
    assert asked == [authenticate, site._raw_only]
    assert [f.cb for f in core.in_filter_reg.find("other", "topic")] == [authenticate]


def test_silos_say_nothing_to_one_another() -> None:
    """The coordinator's NVFlare process passes no request on, whatever its channel and whoever it names as sender."""
    for origin in ("hospital-a", "server"):
        said = Message({MessageHeaderKey.ORIGIN: origin, MessageHeaderKey.DESTINATION: "hospital-b"}, b"x")
        refused = site._own_only(said, "server")
        assert refused is not None and refused.get_header(MessageHeaderKey.RETURN_CODE) != "ok"
    assert site._own_only(Message({MessageHeaderKey.DESTINATION: "server"}, b"x"), "server") is None


@pytest.mark.slow
def test_an_enrolled_silo_that_turns_hostile(tmp_path: Path) -> None:
    kits = demo_network(tmp_path)
    coordinator, hostile, victim = kits["coordinator"], kits["hospital-a"], kits["hospital-b"]
    notes, mark = tmp_path / "notes.json", tmp_path / "executed"

    def add(resources: Any) -> None:
        resources["class_allow_list"].append("hostile.Hostile")
        resources["components"].append({"id": "hostile", "path": "hostile.Hostile", "args": {}})

    edit(hostile, "resources.json", add)
    children = {"coordinator": relay(coordinator), "victim": relay(victim), "hostile": relay(hostile)}
    children["hostile"].environment |= {
        "PYTHONPATH": str(HERE),
        "HOSTILE_NOTES": str(notes),
        "HOSTILE_MARK": str(mark),
        "HOSTILE_TARGET": "hospital-b",
    }
    try:
        children["coordinator"].start()
        children["victim"].start()
        assert until(lambda: connected(coordinator, "hospital-b"), 60)
        before = {name: memory(child) for name, child in children.items() if child.process is not None}
        children["hostile"].start()
        assert until(notes.exists, 180), log_of(hostile)
        for target, size in before.items():
            assert memory(children[target]) < size + 400 * 2**20, target
        found = json.loads(notes.read_text())
        assert len(found) == 14
        for attack, reply in found.items():
            assert reply["code"] != "ok" and not isinstance(reply["body"], int), (attack, reply)
        # the answer to a request in the coordinator's name would go to the coordinator: look at what it would do
        assert not list((victim.run / "spool").iterdir())
        assert not mark.exists()
        # both are as well as before, and the victim still answers the coordinator
        assert seen(coordinator, "hospital-b")["clock_skew"] is not None
    finally:
        for child in children.values():
            child.stop()


def memory(child: Any) -> int:
    return int(psutil.Process(child.process.pid).memory_info().rss)
