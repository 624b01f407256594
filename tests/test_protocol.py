"""protocol.py: frames as the original's, random messages, damaged bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import protocol

FRAMES = Path(__file__).parent / "frames"
ENCODED = [case for case in json.loads((FRAMES / "encode.json").read_text()) if case["hex"]]
DECODED = json.loads((FRAMES / "decode.json").read_text())
KNOWN_TAGS = {"server->runner": b"\1\2", "runner->server": b"\1\2\3"}


def recorded_message(kind: str, job: int = 0, name: str = "", configs: Any = ()) -> Any:
    if kind == "JobConfigs":
        return protocol.JobConfigs(configs=tuple(configs))
    if kind == "Enqueue":
        return protocol.Enqueue(job=job, name=name)
    return getattr(protocol, kind)(job=job)


def expected_of(case: dict[str, Any]) -> Any:
    """What decoding a recorded frame must give: messages, or ProtocolError where the original throws or invents."""
    frame, result = bytes.fromhex(case["hex"]), case["result"]
    if frame[:1] not in KNOWN_TAGS[case["direction"]] or not frame:
        return []
    has_broken_name = case["case"].startswith("name ")
    if has_broken_name or result["message"].endswith("Undefined") or '"throws"' in json.dumps(result):
        return protocol.ProtocolError
    return [recorded_message(result["message"], result.get("id"), result.get("name"), result.get("configs"))]


def decode(case: dict[str, Any], data: bytes | str) -> Any:
    decoders = {"server->runner": protocol.decode_from_server, "runner->server": protocol.decode_from_worker}
    try:
        return decoders[case["direction"]](data)
    except protocol.ProtocolError:
        return protocol.ProtocolError


int32 = st.integers(-(2**31), 2**31 - 1)
attempts = st.integers(1, 2**31 - 1)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=128)
configs = st.fixed_dictionaries(
    {"command": st.none() | words, "image": words, "name": words},
    optional={"timeout": st.integers(0, 2**31 - 1), "tags": st.lists(words)},
)
held = st.tuples(
    int32.filter(lambda job: job > -(2**31)), attempts, st.sampled_from(["assigned", "running", "finished"])
)
FROM_SERVER: list[Any] = [
    st.builds(protocol.JobConfigs, st.lists(configs, max_size=3).map(tuple)),
    st.builds(protocol.Enqueue, int32, words, attempts, st.dictionaries(words, words, max_size=3)),
    *(st.builds(kind, int32, attempts) for kind in (protocol.Go, protocol.Stop, protocol.Settled)),
    st.builds(protocol.Logged, int32, attempts, st.integers(0, 2**63 - 1)),
]
FROM_WORKER: list[Any] = [
    st.builds(protocol.JobRunning, int32, attempts),
    st.builds(protocol.JobSuccess, int32, attempts, st.just(0)),
    st.builds(protocol.JobFailure, int32, attempts, st.none() | int32.filter(lambda code: code > -(2**31)), words),
    st.builds(
        protocol.Hello, names, st.integers(1, 10_000), st.lists(words).map(tuple), words, st.lists(held).map(tuple)
    ),
    st.builds(protocol.Log, int32, attempts, st.integers(0, protocol.MAX_LOG_OFFSET - 1), st.binary(max_size=100)),
]
MESSAGES = [kind for kind in vars(protocol).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]


class TestFrames:
    """A frame is the original's, byte for byte; what is no frame is a ProtocolError and nothing else."""

    @pytest.mark.parametrize("case", ENCODED, ids=lambda case: f"{case['message']}-{case['hex'][:40]}")
    def test_encoded_as_recorded(self, case: dict[str, Any]) -> None:
        args = case["args"]
        message = recorded_message(case["message"], args.get("id"), args.get("name"), args.get("configs"))
        assert protocol.encode(message).hex() == case["hex"]

    @pytest.mark.parametrize("case", DECODED, ids=lambda case: f"{case['frame']}-{case['case']}-{case['hex'][:12]}")
    def test_decoded_as_recorded(self, case: dict[str, Any]) -> None:
        data = bytes.fromhex(case["hex"])
        assert decode(case, data) == expected_of(case)
        with contextlib.suppress(UnicodeDecodeError):  # such text is refused before it is a frame
            assert decode(case, data.decode()) == expected_of(case)

    @given(st.lists(st.one_of(FROM_SERVER), max_size=5))
    def test_what_a_server_says_survives_the_wire(self, messages: list[Any]) -> None:
        assert [found for one in messages for found in protocol.decode_from_server(protocol.encode(one), 2)] == messages
        assert protocol.decode_from_server(protocol.encode_batch(messages), 2) == messages

    @given(st.lists(st.one_of(FROM_WORKER), max_size=5))
    def test_what_a_worker_says_survives_the_wire(self, messages: list[Any]) -> None:
        assert [found for one in messages for found in protocol.decode_from_worker(protocol.encode(one), 2)] == messages
        assert protocol.decode_from_worker(protocol.encode_batch(messages), 2) == messages

    @given(st.one_of(FROM_SERVER[:2]))
    def test_version_1_reads_the_version_1_part_of_version_2(self, message: Any) -> None:
        plain = (
            {"configs": tuple({k: c[k] for k in ("command", "image", "name")} for c in message.configs)}
            if isinstance(message, protocol.JobConfigs)
            else {"attempt": 0, "environment": None}
        )
        assert protocol.decode_from_server(protocol.encode(message)) == [dataclasses.replace(message, **plain)]

    @given(
        st.sampled_from([0, 1, 2, 3, 4, 16, 17, 18, 19, 31, 32, 255]), st.binary(max_size=64), st.sampled_from([1, 2])
    )
    def test_any_bytes_are_messages_or_a_protocol_error(self, tag: int, rest: bytes, version: int) -> None:
        self.decodes_or_refuses(bytes([tag]) + rest, version)

    @given(st.one_of(FROM_SERVER + FROM_WORKER), st.data())
    def test_a_damaged_frame_is_messages_or_a_protocol_error(self, message: Any, data: st.DataObject) -> None:
        frame = bytearray(protocol.encode(message))
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
        self.decodes_or_refuses(bytes(frame[: data.draw(st.integers(0, len(frame)))]), 2)

    @staticmethod
    def decodes_or_refuses(frame: bytes, version: int) -> None:
        for decoder in (protocol.decode_from_server, protocol.decode_from_worker):
            with contextlib.suppress(protocol.ProtocolError):
                assert all(type(message) in MESSAGES for message in decoder(frame, version))

    @pytest.mark.parametrize(
        "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000, '[{"name":"\\ud800","image":""}]']
    )
    def test_json_that_hurts_is_a_protocol_error(self, text: str) -> None:
        with pytest.raises(protocol.ProtocolError):
            protocol.decode_from_server(b"\1" + text.encode(), 2)
        with pytest.raises(protocol.ProtocolError):
            protocol.decode_from_worker(b"\1\0\0\0\1" + text.encode(), 2)

    @pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
    def test_the_specification_describes_every_message(self, kind: Any) -> None:
        frame = protocol.encode(SAMPLES[kind])
        assert re.search(rf"^ +{frame[0]} {kind.__name__}\b", protocol.__doc__ or "", re.MULTILINE)

    @pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
    def test_a_message_never_changes(self, kind: Any) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(SAMPLES[kind], dataclasses.fields(kind)[0].name, 2)

    def test_a_batch_within_a_batch_is_a_protocol_error(self) -> None:
        inner = b"\x1f" + struct.pack(">I", 5) + b"\x01\x00\x00\x00\x01"
        with pytest.raises(protocol.ProtocolError, match="another batch"):
            protocol.decode_from_worker(b"\x1f" + struct.pack(">I", len(inner)) + inner, 2)


SAMPLES: dict[Any, Any] = {
    protocol.JobConfigs: protocol.JobConfigs(()),
    protocol.Enqueue: protocol.Enqueue(1, "a", 1),
    protocol.Go: protocol.Go(1, 1),
    protocol.Stop: protocol.Stop(1, 1),
    protocol.Settled: protocol.Settled(1, 1),
    protocol.Logged: protocol.Logged(1, 1, 0),
    protocol.JobRunning: protocol.JobRunning(1, 1),
    protocol.JobSuccess: protocol.JobSuccess(1, 1),
    protocol.JobFailure: protocol.JobFailure(1, 1),
    protocol.Hello: protocol.Hello("a", 1, (), "", ()),
    protocol.Log: protocol.Log(1, 1, 0, b""),
    protocol.Reading: protocol.Reading(1, 1, 1),
    protocol.ReadAgain: protocol.ReadAgain(1, 1, 1),
    protocol.Pulling: protocol.Pulling(1, 1, "host.example:5000/straße"),
}
