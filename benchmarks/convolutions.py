"""Times depthwise convolutions, and the gradient of the filters of others, in two implementations each.

    python benchmarks/convolutions.py

The maps are those of EfficientNet-Lite0 and its pyramid for 4 images of 256 x 320 pixels, and those of ResNet-50 under
a pyramid for one image of 608 x 800. Numbers are milliseconds of processor time over all cores, the least of five
calls: other programs on the machine change it less than the time on the clock.
"""

import functools
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

# A checkout need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fasterrcnn_jax.ops.convolution import by_xla, gradient_by_blocks  # noqa: E402
from fasterrcnn_jax.ops.depthwise import grouped, shifted  # noqa: E402

# Rows, columns, channels, size of the filter, stride.
DEPTHWISE = (
    (128, 160, 32, 3, 1),
    (128, 160, 96, 3, 2),
    (64, 80, 144, 3, 1),
    (64, 80, 144, 5, 2),
    (32, 40, 240, 5, 1),
    (32, 40, 240, 3, 2),
    (16, 20, 480, 3, 1),
    (16, 20, 480, 5, 1),
    (16, 20, 672, 5, 1),
    (16, 20, 672, 5, 2),
    (8, 10, 1152, 5, 1),
    (8, 10, 1152, 3, 1),
)
# Images, rows, columns, channels; filters of 3 x 3.
FILTERS = (
    (4, 64, 80, 96),
    (4, 64, 80, 128),
    (4, 32, 40, 96),
    (4, 16, 20, 96),
    (8, 20, 28, 64),
    (1, 152, 200, 64),
    (1, 152, 200, 256),
    (1, 76, 100, 128),
)


def milliseconds(function, *arguments) -> float:
    """Returns the processor time of a call that is compiled already."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(5):
        begun = time.process_time()
        jax.block_until_ready(function(*arguments))
        times.append(time.process_time() - begun)
    return 1e3 * min(times)


def print_filter_gradients() -> None:
    print("| images | map | gradient of the input | of the filters, blocks of rows | of the filters, XLA |")
    print("|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    padding = (1, 1), (1, 1)
    for images, height, width, channels in FILTERS:
        x, y = (jnp.asarray(rng.standard_normal((images, height, width, channels), np.float32)) for _ in range(2))
        kernel = jnp.asarray(rng.standard_normal((3, 3, channels, channels), np.float32))
        found = [
            milliseconds(
                jax.jit(lambda x, kernel, y: jax.vjp(lambda x: by_xla(x, kernel, 1, padding, x.dtype), x)[1](y)),
                x,
                kernel,
                y,
            ),
            milliseconds(jax.jit(lambda x, y: gradient_by_blocks(x, y, padding, 3)), x, y),
            milliseconds(
                jax.jit(
                    lambda x, kernel, y: jax.vjp(lambda kernel: by_xla(x, kernel, 1, padding, x.dtype), kernel)[1](y)
                ),
                x,
                kernel,
                y,
            ),
        ]
        numbers = " | ".join(f"{number:.1f}" for number in found)
        print(f"| {images} | {height} x {width} x {channels} | {numbers} |", flush=True)


def print_depthwise() -> None:
    print("| map | filter | stride | shifted: forward | both gradients | grouped: forward | both gradients |")
    print("|---|---|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    for height, width, channels, size, stride in DEPTHWISE:
        x = jnp.asarray(rng.standard_normal((4, height, width, channels), np.float32))
        kernel = jnp.asarray(rng.standard_normal((size, size, 1, channels), np.float32))
        found = []
        for function in (shifted, grouped):
            forward = jax.jit(functools.partial(function, stride=stride))
            pull = jax.jit(lambda x, kernel, y, forward=forward: jax.vjp(forward, x, kernel)[1](y))
            y = forward(x, kernel)
            found += [milliseconds(forward, x, kernel), milliseconds(pull, x, kernel, y)]
        numbers = " | ".join(f"{number:.1f}" for number in found)
        print(f"| {height} x {width} x {channels} | {size} x {size} | {stride} | {numbers} |", flush=True)


def main() -> None:
    print_depthwise()
    print_filter_gradients()


if __name__ == "__main__":
    main()
