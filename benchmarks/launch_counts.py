"""Counts the kernels that a program launches which XLA has optimised for a GPU, and the bytes that they move."""

import math
import re

# XLA sorts in place by the bitonic network (EmitSort of its GPU back end). What is compared inside a tile is one
# kernel, every comparison over a larger distance is one more. A tile is a power of two up to TILE whose values fit
# into the shared memory that every block has.
TILE, TILE_BYTES = 4096, 48 * 1024

# Instructions that launch nothing.
_SILENT = {
    *("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "partition-id", "replica-id"),
    *("while", "conditional", "call", "after-all", "opt-barrier", "async-done", "copy-done"),
}


def launched(hlo: str) -> list[str]:
    """Returns the instructions of an optimised program that launch kernels or copy, each once, as `opcode line`.

    XLA may write a sort as a fusion that holds nothing else: then the sort is returned. A fusion that ends with a
    scatter has the opcode scatter.
    """
    computations: dict[str, list[str]] = {}
    entry = body = None
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            body = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif body is not None and " = " in line:
            body.append(line.strip())
    found, waiting, seen = [], [entry], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in computations[name]:
            opcode = _opcode(line)
            if opcode in ("while", "conditional", "call", "async-start"):
                called = r"(?:body|condition|to_apply|calls|\w+_computation)=%?([\w.-]+)"
                waiting += re.findall(called, line)
                for several in re.findall(r"branch_computations=\{(.*?)\}", line):
                    waiting += re.findall(r"[\w.-]+", several)
            elif opcode == "fusion":
                inside = computations.get(re.search(r"calls=%?([\w.-]+)", line)[1], [])
                sorts = [each for each in inside if _opcode(each) == "sort"]
                kind = "scatter" if inside and _opcode(inside[-1]) == "scatter" else "fusion"
                found += [f"sort {each}" for each in sorts] or [f"{kind} {line}"]
            elif opcode not in _SILENT:
                found.append(f"{opcode} {line}")
    return found


def _opcode(instruction: str) -> str:
    return re.search(r" = (?:\(.*?\)|\S+) ([a-z][\w-]*)\(", instruction)[1]


def launches_of(instruction: str) -> int:
    """Returns the number of launches of one entry of `launched`: a sort is one per pass, others are taken for one.

    The sorts that XLA hands over to CUB where a GPU is at hand (one key, no batch) are custom calls in its program.
    """
    if not instruction.startswith("sort "):
        return 1
    results, _, rest = instruction.partition(" = ")[2].partition(" sort(")
    operands = re.findall(r"([a-z]+)(\d*)\w*\[([\d,]+)\]", results)
    lengths = operands[0][2].split(",")
    # A pred takes a byte.
    row_bytes = sum(max(int(bits or 8) // 8, 1) for _, bits, _ in operands)
    dimension = re.search(r"dimensions=\{(\d+)\}", rest)[1]
    return sort_passes(int(lengths[int(dimension)]), row_bytes)


def sort_passes(length: int, row_bytes: int) -> int:
    """Returns the number of kernels that sort rows of `length` values; the operands have `row_bytes` for each.

    Stage s of the network, s = 0, 1, ..., compares over distances of 2^s, ..., 2, 1. The stages inside a tile of 2^t
    are one kernel. Each later stage s has one for each distance of a tile or more, s - t + 1, and one for the rest.
    """
    tile_stages = int(math.log2(min(TILE, TILE_BYTES // row_bytes)))
    beyond = max(max(length - 1, 0).bit_length() - tile_stages, 0)
    return 1 + sum(passes + 1 for passes in range(1, beyond + 1))


# Bits of a value.
_BITS = {"pred": 8, "bf16": 16} | {f"{kind}{bits}": bits for kind in "suf" for bits in (4, 8, 16, 32, 64)}


def _bytes_of(shape: str) -> int:
    """Returns the size of `f32[8,4]{1,0}`, or of all parts of a tuple of such shapes."""
    parts = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    return sum(_BITS.get(kind, 0) * math.prod(int(n) for n in sides.split(",") if n) for kind, sides in parts) // 8


def traffic(hlo: str) -> dict[str, int]:
    """Returns the bytes that the launches of an optimised program read and write, by kind, and those of all.

    Every operand and result counts whole and once: an upper bound of a gather's bytes, and the bytes of a loop's body
    once. A scatter into its first operand reads the other operands, and moves as many bytes again in and out of the
    array. The kinds are `convolution` (products of matrices included), `elementwise` (XLA's loop fusions), and
    `other`.
    """
    shape = r"(?:\(.*?\)|\S+)"
    results = re.findall(rf"^\s*(?:ROOT )?%?([\w.-]+) = ({shape}) [a-z]", hlo, re.MULTILINE)
    sizes = {name: _bytes_of(result) for name, result in results}
    found = dict.fromkeys(("all", "convolution", "elementwise", "other"), 0)
    for launch in launched(hlo):
        name, listed = re.search(rf"%?([\w.-]+) = {shape} [a-z][\w-]*\((.*?)\)", launch).groups()
        operands = [sizes[operand] for operand in re.findall(r"%([\w.-]+)", listed)]
        in_place = launch.startswith("scatter ") and operands[0] == sizes[name]
        size = 3 * sum(operands[1:]) if in_place else sizes[name] + sum(operands)
        if "gemm" in name or re.search(r'custom_call_target="__(cudnn\$conv|cublas)', launch):
            kind = "convolution"
        else:
            kind = "elementwise" if "kind=kLoop" in launch else "other"
        found[kind] += size
        found["all"] += size
    return found
