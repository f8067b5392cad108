# SPDX-License-Identifier: Apache-2.0
"""DeltaNet and Gated DeltaNet: matrix memories that correct what they recall for a key."""

from flax import nnx
from jaxtyping import Array, Float, Int

from nlx import objectives
from nlx.level import Association
from nlx.nn.convolution import Window
from nlx.nn.decay import Decay
from nlx.nn.gate import Gate
from nlx.nn.linear import check_sizes
from nlx.nn.linear_memory import LinearMemory
from nlx.nn.readout import ReadOut
from nlx.nn.recall import Asked
from nlx.nn.stream import Streams, unit

VALUE_EXPANSION = 2  # of Gated DeltaNet

Windows = dict[str, Window]


class DeltaNet(LinearMemory):
    """S_t = S_{t-1} - beta_t k_t (k_t^T S_{t-1} - v_t^T): a step of size beta_t on 1/2 |k S - v|^2.

    q, k, v = silu(conv_4(x W)), q and k of unit length; beta = sigmoid(x W_beta + b), or twice
    that: then the transition I - beta k k^T may have the eigenvalue -1 and can track parity. What a
    head recalls is normalised by its root mean square.

    Source: Yang et al. (2024), Parallelizing Linear Transformers with the Delta Rule, section 3.3;
    Grazzi et al. (2024), Unlocking State-Tracking in Linear RNNs (negative eigenvalues).
    """

    objective = staticmethod(objectives.l2)

    def __init__(
        self, width: int, *, heads: int, negative_eigenvalues: bool = False, rngs: nnx.Rngs
    ):
        """Draws the maps.

        Args:
          width: channels of x and y, a multiple of `heads`.
          heads: heads of width / heads channels.
          negative_eigenvalues: whether beta is in (0, 2), not (0, 1).

        Raises:
          ValueError: sizes that do not divide.
        """
        head_dim = _divide(width, heads)
        super().__init__(width, heads, head_dim, head_dim)
        self.top = 2.0 if negative_eigenvalues else 1.0
        self.streams = _streams(width, heads, head_dim, rngs=rngs)
        self.beta = Gate(width, heads, 0.0, rngs=rngs)
        self.out = ReadOut(width, heads, head_dim, gated=False, rngs=rngs)

    def ask(
        self,
        x: Float[Array, "b t d"],
        before: Windows | None,
        segment_ids: Int[Array, "b t"] | None,
    ) -> tuple[Asked, Windows]:
        """before: the convolutions' inputs."""
        made, windows = self.streams(x, before, segment_ids)
        stored = Association(unit(made["key"]), made["value"], rate=self.top * self.beta(x))
        return Asked(unit(made["query"]), stored), windows


class GatedDeltaNet(LinearMemory):
    """S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T: forgets, then corrects.

    q, k, v, beta as of DeltaNet; alpha = exp(-A softplus(x W_alpha + b)), see `Decay`. Values are
    twice as wide as keys; what a head recalls is normalised and gated, see `ReadOut`.

    Source: Yang et al. (2025), Gated Delta Networks, Eq. 10, section 3.4.
    """

    erases = True

    def __init__(self, width: int, *, heads: int, rngs: nnx.Rngs):
        """Draws the maps.

        Args:
          width: channels of x and y, a multiple of `heads`.
          heads: heads, with keys of width / heads channels each.

        Raises:
          ValueError: sizes that do not divide.
        """
        head_dim = _divide(width, heads)
        super().__init__(width, heads, head_dim, VALUE_EXPANSION * head_dim)
        self.streams = _streams(width, heads, head_dim, self.value_dim, rngs=rngs)
        self.alpha = Decay(width, heads, rngs=rngs)
        self.beta = Gate(width, heads, 0.0, rngs=rngs)
        self.out = ReadOut(width, heads, self.value_dim, rngs=rngs)

    def ask(
        self,
        x: Float[Array, "b t d"],
        before: Windows | None,
        segment_ids: Int[Array, "b t"] | None,
    ) -> tuple[Asked, Windows]:
        """before: the convolutions' inputs."""
        made, windows = self.streams(x, before, segment_ids)
        beta, (_, alpha) = self.beta(x), self.alpha(x)
        stored = Association(
            unit(made["key"]), made["value"], rate=beta, retain=alpha, erase=alpha * beta
        )
        return Asked(unit(made["query"]), stored), windows


def _streams(width, heads, key_dim, value_dim=None, *, rngs) -> Streams:
    """Queries, keys and values; those as wide as keys unless they are told otherwise."""
    sizes = dict.fromkeys(("query", "key"), (heads, key_dim))
    return Streams(width, sizes | {"value": (heads, value_dim or key_dim)}, rngs=rngs)


def _divide(width: int, heads: int) -> int:
    """Channels of a head."""
    check_sizes(width=width, heads=heads)
    if width % heads:
        raise ValueError(f"`heads` is {heads}; it must be a divisor of width = {width}.")
    return width // heads
