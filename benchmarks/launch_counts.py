"""How many kernels an instruction of a program that XLA has optimised for a GPU launches."""

import re

# XLA sorts in place by the bitonic network (EmitSort of its GPU back end). What is compared inside a tile of this size
# is one kernel; every comparison over a larger distance is one more.
TILE_STAGES = 12


def launches_of(instruction: str) -> int:
    """Returns the number of launches of one instruction that launches something, a line of the program.

    A sort is one kernel per pass; other instructions are taken for one. The sorts that a GPU at hand would hand over
    to CUB (one key, no batch) are custom calls in its program.
    """
    if not re.search(r"\) sort\(|[\]}] sort\(", instruction):
        return 1
    shape = re.search(r" = \(?\w+\[([\d,]+)\]", instruction)[1].split(",")
    dimension = int(re.search(r"dimensions=\{(\d+)\}", instruction)[1])
    return sort_passes(int(shape[dimension]))


def sort_passes(length: int) -> int:
    """Returns the number of kernels that sort rows of `length` values.

    Stage s of the network, s = 0, 1, ..., compares over distances of 2^s, ..., 2, 1. The stages inside a tile are one
    kernel. Each later stage s has one for each distance of a tile or more, s - 11, and one for the rest.
    """
    stages = max(length - 1, 0).bit_length()
    beyond = max(stages - TILE_STAGES, 0)
    return 1 + sum(passes + 1 for passes in range(1, beyond + 1))
