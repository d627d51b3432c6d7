"""Bench: what secure aggregation costs, in seconds and bytes, with dropouts; and beside Flower's primitives.

Silos are simulated in this process, one after another; a tenth drops out after the exchange of mask keys, so that their
pairwise masks must be taken off again. The server's total is taking in all masked vectors, giving back the secrets and
taking off the masks; beside it stand its parts measured in the same run: summing the same vectors unmasked (unpacking
included) and generating as many masks as it must. Times are CPU seconds of this process, which on an idle machine are
seconds on one core; the best of several where they repeat.

Flower's SecAgg+ is measured by its own functions on the same sizes and numbers of masks, if `flwr` is installed (or
lies in a folder named by --flwr). Its masks come from numpy's MT19937 seeded with 32 bits, which is no cryptographic
generator; fedlm's come from AES-256 in counter mode.

    python benchmarks/secure_aggregation.py [--silos 100] [--values 1000000] [--dropout 0.1] [--quick] [--flwr FOLDER]
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from fedlm.privacy.secagg import Coordinator, Encoding, Message, Parameters, Policy, Risk, Silo, State, choose, encode
from fedlm.privacy.secagg.identity import Ed25519Directory, Ed25519Signer
from fedlm.privacy.secagg.masks import BLOCK, add_mask
from fedlm.privacy.secagg.packing import add_packed, pack, unpack


@dataclass
class Times:
    """Seconds by what they went for."""

    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def __call__(self, what: str, work: Callable[..., Any], *arguments: Any) -> Any:
        began = time.process_time()
        result = work(*arguments)
        self.spent[what] += time.process_time() - began
        return result


def best(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of several calls."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def message_bytes(message: Message) -> int:
    return sum(a.nbytes for a in message.arrays.values()) + len(json.dumps(message.fields))


def generate(key: bytes, length: int) -> None:
    """A mask's stream alone, in blocks as `masks` makes it, and added to nothing."""
    stream = Cipher(AES256(key), CTR(bytes(16))).encryptor()
    for start in range(0, length, BLOCK):
        stream.update_into(ZEROS[: 4 * min(BLOCK, length - start)], BUFFER)


ZEROS, BUFFER = memoryview(bytes(4 * BLOCK)), bytearray(4 * BLOCK + 15)


def aggregation(options: argparse.Namespace) -> dict[str, Any]:
    """One aggregation from keys to sum: figures of the server, of one silo, and of what travels."""
    names = tuple(f"silo-{i:04}" for i in range(options.silos))
    risk = Risk(options.dropout, options.corruption, malicious=options.malicious)
    encoding = Encoding(scale=0.1, bits=options.bits, largest_weight=1, silos=len(names))
    parameters = Parameters(
        run="bench", round=0, attempt=0, silos=names, design=choose(len(names), risk), seed=bytes(32),
        ring_bits=encoding.ring_bits, length=options.values + 1, malicious=options.malicious, agreed=encoding.fields,
    )  # fmt: skip
    identities = {name: Ed25519PrivateKey.generate() for name in names}
    directory = Ed25519Directory({n: key.public_key().public_bytes_raw() for n, key in identities.items()})
    silos = {n: Silo(n, Ed25519Signer(key), directory, Policy(risk)) for n, key in identities.items()}
    dropped = set(names[:: round(1 / options.dropout)][: int(options.dropout * len(names))] if options.dropout else ())
    coordinator, server, silo_time = Coordinator(parameters, directory), Times(), Times()
    states: dict[str, State] = {}
    sent: dict[str, int] = defaultdict(int)
    received: dict[str, int] = defaultdict(int)
    expected = np.zeros(parameters.length, np.uint32)
    random = np.random.default_rng(0)
    packed: list[Any] = []

    def phase(name: str, take: Callable[[str, Message], None], absent: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        requests = server(f"{name}: requests", getattr(coordinator, f"{name}_requests"))
        for silo, request in requests.items():
            if silo in absent:
                continue
            if name == "train":
                values = silo_time("quantise", encode, random.normal(0, 0.02, options.values), 1, encoding, random)[0]
                expected[:] += values
                if len(packed) < 4:
                    packed.append(pack(values, parameters.ring_bits))
                states[silo], reply = silo_time(name, silos[silo].train, states[silo], request, values)
            else:
                states[silo], reply = silo_time(name, getattr(silos[silo], name), states.get(silo), request)
            received[name] += message_bytes(request)
            sent[name] += message_bytes(reply)
            server(f"{name}: replies", take, silo, reply)

    phase("keys", coordinator.take_keys)
    phase("shares", coordinator.take_shares)
    phase("train", coordinator.take_masked, dropped)
    if options.malicious:
        phase("consistency", coordinator.take_consistency, dropped)
    phase("unmask", coordinator.take_unmask, dropped)
    found = server("unmask: taking off", coordinator.finish)
    if not np.array_equal(found.values, expected & np.uint32(2**parameters.ring_bits - 1)):
        raise SystemExit("the sum is wrong")
    left = set(names) - dropped
    masks = len(left) + sum(len(parameters.among(silo, left)) for silo in dropped)
    total = np.zeros(parameters.length, np.uint32)
    one = best(lambda: add_packed(total, packed[0], parameters.ring_bits), 7)
    mask = best(lambda: add_mask(total, bytes(32)), 7)
    summing = Times()
    for place in range(len(left)):
        summing("all", add_packed, total, packed[place % len(packed)], parameters.ring_bits)
    generating = Times()
    for place in range(masks):
        generating("all", generate, place.to_bytes(32, "big"), parameters.length)
    vector = server.spent["train: replies"] + server.spent["unmask: taking off"]
    whole, plain, generated = sum(server.spent.values()), summing.spent["all"], generating.spent["all"]
    return {
        "silos": len(names),
        "dropped": len(dropped),
        "values": options.values,
        "ring_bits": parameters.ring_bits,
        "degree": parameters.design.degree,
        "threshold": parameters.design.threshold,
        "masks_taken_off": masks,
        "server_total_s": whole,
        "server_vectors_s": vector,
        "server_parts_s": dict(server.spent),
        "plain_summing_s": plain,
        "mask_generation_s": generated,
        "total_over_parts": whole / (plain + generated),
        "silo_s": {name: seconds / len(left) for name, seconds in silo_time.spent.items()},
        "silo_sends_bytes": {name: size / len(left) for name, size in sent.items()},
        "silo_receives_bytes": {name: size / len(left) for name, size in received.items()},
        "payload_over_bound": parameters.payload_bytes / (options.values * parameters.ring_bits / 8),
        "all_sent_over_bound": sum(sent.values()) / len(left) / (options.values * parameters.ring_bits / 8),
        "payload_over_unmasked": parameters.payload_bytes / (options.values * encoding.bits / 8),
        "unpack_add_gb_s": 4 * parameters.length / one / 1e9,
        "mask_gb_s": 4 * parameters.length / mask / 1e9,
    }


def primitives(length: int, bits: int) -> dict[str, float]:
    """GB/s of uint32 for packing and unpacking, and for a bare copy."""
    values = np.random.default_rng(0).integers(0, 2**bits, length, dtype=np.uint32)
    data, target = pack(values, bits), np.empty_like(values)
    return {
        "copy": values.nbytes / best(lambda: np.copyto(target, values), 7) / 1e9,
        "pack": values.nbytes / best(lambda: pack(values, bits), 7) / 1e9,
        "unpack": values.nbytes / best(lambda: unpack(data, length, bits), 7) / 1e9,
    }


def flower(figures: dict[str, Any], options: argparse.Namespace) -> dict[str, Any] | None:
    """Flower's own functions on the same work; None if it is not installed."""
    if options.flwr:
        sys.path.append(str(options.flwr))
    try:
        import flwr
        from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
        from flwr.common.secure_aggregation.ndarrays_arithmetic import (
            parameters_addition,
            parameters_mod,
            parameters_subtraction,
        )
        from flwr.common.secure_aggregation.quantization import quantize
        from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
    except ImportError as error:
        if options.flwr:
            raise SystemExit(f"flwr in {options.flwr} cannot be used: {error}") from None
        return None
    modulus, shape = 2 ** figures["ring_bits"], [(figures["values"] + 1,)]
    vector = quantize([np.random.default_rng(0).normal(0, 0.02, shape[0])], 0.1, 2**options.bits - 1)
    seed, threshold, holders = bytes(range(32)), figures["threshold"], figures["degree"] + 1
    state = {"total": [np.zeros(shape[0], np.int64)]}

    def add() -> None:
        state["total"] = parameters_mod(parameters_addition(state["total"], vector), modulus)

    def take_off() -> None:
        mask = pseudo_rand_gen(seed, modulus, shape)
        state["total"] = parameters_mod(parameters_subtraction(state["total"], mask), modulus)

    shares = create_shares(seed, threshold, holders)
    one = {
        "add": best(add, options.repeats),
        "mask": best(take_off, options.repeats),
        "generate": best(lambda: pseudo_rand_gen(seed, modulus, shape), options.repeats),
        "combine": best(lambda: combine_shares(shares[:threshold]), options.repeats),
        "quantise": best(
            lambda: quantize([np.random.default_rng(0).normal(0, 0.02, shape[0])], 0.1, 2**options.bits - 1),
            options.repeats,
        ),
    }
    left = figures["silos"] - figures["dropped"]
    vectors = left * one["add"] + figures["masks_taken_off"] * one["mask"]
    server = vectors + figures["silos"] * one["combine"]
    silo = (figures["degree"] + 1) * one["mask"]
    return {
        "version": flwr.__version__,
        "one_s": one,
        "server_s": server,
        "silo_masking_s": silo,
        "server_ratio": server / figures["server_total_s"],
        "vectors_s": vectors,
        "vectors_ratio": vectors / figures["server_vectors_s"],
        "silo_ratio": silo / figures["silo_s"]["train"],
        "mask_gb_s": 4 * shape[0][0] / one["generate"] / 1e9,
    }


def show(figures: dict[str, Any], other: dict[str, Any] | None) -> None:
    f = figures
    print(
        f"{f['silos']} silos, {f['dropped']} drop out after the key exchange; {f['values']:,} values in "
        f"{f['ring_bits']} bits; {f['degree']} neighbours each, threshold {f['threshold']}; "
        f"{f['masks_taken_off']} masks to take off"
    )
    print(f"server, total                    {f['server_total_s']:8.3f} s")
    for name, seconds in f["server_parts_s"].items():
        print(f"  {name:30} {seconds:8.3f} s")
    print(f"plain summing of {f['silos'] - f['dropped']} vectors       {f['plain_summing_s']:8.3f} s")
    print(f"generating {f['masks_taken_off']:5} masks alone     {f['mask_generation_s']:8.3f} s")
    print(f"total / (summing + generation)   {f['total_over_parts']:8.2f}   (goal: at most 3)")
    print("one silo, mean: " + ", ".join(f"{name} {1000 * s:.1f} ms" for name, s in f["silo_s"].items()))
    print("one silo sends: " + ", ".join(f"{name} {size:,.0f} B" for name, size in f["silo_sends_bytes"].items()))
    print("one silo gets:  " + ", ".join(f"{name} {size:,.0f} B" for name, size in f["silo_receives_bytes"].items()))
    print(
        f"masked payload / (values x ring bits / 8)   {f['payload_over_bound']:.6f}, with all that a silo sends "
        f"{f['all_sent_over_bound']:.4f}   (goal: at most 1.05 and keys)"
    )
    print(f"masked payload / unmasked quantised update  {f['payload_over_unmasked']:.3f}")
    print(
        f"GB/s of uint32: mask and add {f['mask_gb_s']:.2f}, unpack and add {f['unpack_add_gb_s']:.2f}, "
        + ", ".join(f"{name} {speed:.2f}" for name, speed in f["primitives_gb_s"].items())
    )
    if other is None:
        print(
            "Flower: comparison skipped, flwr is not installed (pip install --target FOLDER flwr, then --flwr FOLDER)"
        )
        return
    print(f"Flower {other['version']}, its own functions (masks: MT19937 from a 32-bit seed, not cryptographic):")
    print(f"  server {other['server_s']:.2f} s, {other['server_ratio']:.1f}x fedlm's   (goal: at least 3)")
    print(f"  of it on vectors {other['vectors_s']:.2f} s, {other['vectors_ratio']:.1f}x; the rest combines shares")
    print(f"  silo's masking {1000 * other['silo_masking_s']:.0f} ms, {other['silo_ratio']:.1f}x fedlm's")
    print("  one each: " + ", ".join(f"{name} {1000 * s:.2f} ms" for name, s in other["one_s"].items()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--silos", type=int, default=100)
    parser.add_argument("--values", type=int, default=1_000_000)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--corruption", type=float, default=0.1)
    parser.add_argument("--bits", type=int, default=16, help="of one value, before the sum")
    parser.add_argument("--malicious", action="store_true", help="with signed lists of survivors")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="20 silos, 100,000 values")
    parser.add_argument("--flwr", type=Path, help="folder with Flower in it")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.quick:
        options.silos, options.values = 20, 100_000
    gc.disable()
    figures = aggregation(options)
    figures["primitives_gb_s"] = primitives(options.values + 1, figures["ring_bits"])
    other = flower(figures, options)
    if options.json:
        print(json.dumps({"fedlm": figures, "flower": other}))
        return
    show(figures, other)


if __name__ == "__main__":
    main()
