"""What is found of the leading directions of changes, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from svftool.auditing.evidence import EDGE_MARGIN
from svftool.auditing.layout import Axis

Side = Literal["output", "input"]


@dataclass(frozen=True)
class Scaling:
    """What became of the base along each leading direction of one side.

    Attributes
    ----------
    kept : tuple of float
        c, by least squares: 0 where the direction was removed, 1 where nothing happened.
    off : tuple of float
        Norm of what c does not explain over that of the change along the direction: 0 where the
        direction was only scaled, about 1 for any other change.
    """

    kept: tuple[float, ...]
    off: tuple[float, ...]


@dataclass(frozen=True)
class Leading:
    """The leading directions of the change of one matrix.

    Attributes
    ----------
    values : (K,) Tensor
        Leading singular values of the change, float64 and non-increasing.
    left : (K, m) Tensor
        Directions of the rows' space, float32, of unit length.
    right : (K, n) Tensor
        Of the columns' space.
    of_left, of_right : Scaling
        What became of the base along them.
    energy, base_energy : float
        ``||D||_F^2`` and ``||W||_F^2``.
    noise : float
        Part of `energy` that rounding is expected to make.
    edge : float
        Largest singular value that it is expected to make.
    exponent : int
        Power of two that both sides were divided by before all of this was computed.
    """

    values: Tensor
    left: Tensor
    right: Tensor
    of_left: Scaling
    of_right: Scaling
    energy: float
    base_energy: float
    noise: float = 0.0
    edge: float = 0.0
    exponent: int = 0

    @property
    def above(self) -> int:
        """How many of the directions are above the rounding noise."""
        return int((self.values > EDGE_MARGIN * self.edge).sum())

    @property
    def sizes(self) -> tuple[float, ...]:
        """The singular values of the change itself."""
        half = self.exponent // 2
        return tuple(float(s) * 2.0**half * 2.0 ** (self.exponent - half) for s in self.values)

    @property
    def shares(self) -> tuple[float, ...]:
        """Part of the change, without its noise, that each direction holds."""
        whole = max(self.energy - self.noise, float(self.values.square().sum()), 1e-300)
        return tuple(float(s) ** 2 / whole for s in self.values)


@dataclass(frozen=True)
class ChangedMatrix:
    """One matrix whose change was looked at.

    Attributes
    ----------
    name : str
        Of the tensor, in the base.
    index : int or None
        Of the matrix in a batch.
    leading : Leading
    outputs : {"rows", "columns"}
        Which side is the output.
    spectral : bool
        Whether the verdict says that singular values alone changed: then every direction of the
        weight's own is scaled, and none was chosen.
    """

    name: str
    index: int | None
    leading: Leading
    outputs: Axis = "rows"
    spectral: bool = False

    def directions(self, side: Side) -> Tensor:
        """Leading directions of the output or of the input, (K, width)."""
        left = (side == "output") == (self.outputs == "rows")
        return self.leading.left if left else self.leading.right

    def scaling(self, side: Side) -> Scaling:
        """Say what became of the base along them."""
        left = (side == "output") == (self.outputs == "rows")
        return self.leading.of_left if left else self.leading.of_right


@dataclass(frozen=True)
class Token:
    """A token whose row of the unembedding lies near to a direction.

    Attributes
    ----------
    id : int
    text : str or None
        None where no tokenizer is there.
    cosine : float
    """

    id: int
    text: str | None
    cosine: float


@dataclass(frozen=True)
class Tokens:
    """The nearest tokens at both ends of a direction, whose sign says nothing."""

    along: tuple[Token, ...]
    against: tuple[Token, ...]


@dataclass(frozen=True)
class SharedSpace:
    """The leading directions of all changes whose outputs, or inputs, have one width.

    Attributes
    ----------
    side : {"output", "input"}
    width : int
    matrices : int
        How many have a leading direction above rounding noise.
    direction : (width,) Tensor
        Nearest to all of them.
    alignment : float
        Mean squared cosine with it.
    by_chance : float
        What that is for random directions, about.
    log_p : float
        Natural logarithm of the chance that random directions agree so well.
    log_adjusted : float
        The same, corrected for the number of spaces (Holm).
    tokens : Tokens or None
    """

    side: Side
    width: int
    matrices: int
    direction: Tensor
    alignment: float
    by_chance: float
    log_p: float
    log_adjusted: float = 0.0
    tokens: Tokens | None = None


@dataclass(frozen=True)
class Edit:
    """Directions that were scaled or removed, and in which matrices.

    Attributes
    ----------
    side : {"output", "input", "output or input"}
        Of the weights.
    directions : (k, width) Tensor
        Of unit length; orthonormal where all members have them.
    members : tuple of (str, int or None)
        Names of the matrices, with the place in a batch.
    of : int
        Matrices of the same kinds that were compared.
    kinds : tuple of str
        Names of the members with their numbers taken out.
    kept : tuple of float
        What is left along the directions, one a member: 0 removed, 0.5 halved.
    removed : int
        Members that have nothing left, within noise.
    share : float
        Part of the members' change that this is, rounding noise apart.
    log_p : float
        Natural logarithm of a bound of the chance that random directions agree so.
    axis : int or None
        The coordinate that the one direction is, as where a channel was pruned.
    each : int or None
        Where each direction belongs to members of its own: to how many. None where all members have
        all directions.
    tokens : tuple of Tokens
        One a direction; empty where there is no unembedding of the width.
    """

    side: str
    directions: Tensor
    members: tuple[tuple[str, int | None], ...]
    of: int
    kinds: tuple[str, ...]
    kept: tuple[float, ...]
    removed: int
    share: float
    log_p: float
    axis: int | None = None
    each: int | None = None
    tokens: tuple[Tokens, ...] = ()


@dataclass(frozen=True)
class Directions:
    """What the leading directions of a fine-tune's change say together.

    Attributes
    ----------
    count : int
        Directions asked for, K.
    places : tuple of ChangedMatrix
        One a matrix that changed by more than rounding.
    spaces : tuple of SharedSpace
        The least likely first.
    edits : tuple of Edit
        The largest first.
    left_out : tuple of str
        Changed matrices that are known by their singular values alone.
    tokens : mapping of (str, int or None, str) to Tokens
        Nearest tokens of the leading direction of each matrix, by side.
    """

    count: int
    places: tuple[ChangedMatrix, ...]
    spaces: tuple[SharedSpace, ...] = ()
    edits: tuple[Edit, ...] = ()
    left_out: tuple[str, ...] = ()
    tokens: Mapping[tuple[str, int | None, str], Tokens] = field(default_factory=dict)
