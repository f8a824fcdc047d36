"""Explicit Runge-Kutta methods as data: Butcher tableaus that check their own sums, and the names
that users give them.

Sources: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I (II.1 to II.5); Bogacki
and Shampine 1989; Dormand and Prince 1980; Tsitouras 2011, table 1; Hairer's DOP853 (order 8, error
estimates of orders 5 and 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tableau:
    """Stages k_i = f(t + c_i h, x + h sum_j a_ij k_j), j < i; next state x + h sum_i b_i k_i.

    a: rows of 0, 1, 2, ... entries. error: b minus the weights of the embedded method of order
    `error_order`, so that h sum_i error_i k_i estimates the local error; None for a method without
    one. error3: DOP853's second estimate, which tempers the first. Raises ValueError when the
    numbers are no Runge-Kutta method of the order named: the rows of a must sum to c, b must meet
    the 8 order conditions up to order 4 and the quadrature conditions sum b c^(k-1) = 1/k of the
    higher ones, as far as `order` asks for them.
    """

    name: str
    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    error: tuple[float, ...] | None = None
    error_order: int | None = None
    error3: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        stages = len(self.c)
        weights = [row for row in (self.b, self.error, self.error3) if row is not None]
        if (
            not stages
            or [len(row) for row in self.a] != list(range(stages))
            or any(len(row) != stages for row in weights)
        ):
            raise ValueError(
                f"tableau {self.name}: {stages} stages need rows of 0 to {stages - 1} entries in a,"
                f" and {stages} weights in b"
            )
        if (self.error is None) != (self.error_order is None) or (
            self.error3 is not None and self.error is None
        ):
            raise ValueError(f"tableau {self.name}: error, error_order and error3 come together")
        for i, (row, node) in enumerate(zip(self.a, self.c, strict=True)):
            self._check(f"row {i} of a sums to", math.fsum(row), node)
        for what, value, right in self._order_conditions():
            self._check(what, value, right)
        for difference, order in ((self.error, self.error_order), (self.error3, 3)):
            for k in range(1, min(order or 0, 3) + 1) if difference else ():
                self._check(
                    f"error weights of c^{k - 1} sum to",
                    _dot(difference or (), [node ** (k - 1) for node in self.c]),
                    0,
                )

    @classmethod
    def parse(cls, text: str) -> Tableau:
        """A method written as below. A row goes on in the lines without a bar; numbers are decimals
        or fractions."""
        head, *lines = text.strip().splitlines()
        name, order, *error_order = (part.split()[-1] for part in head.split(","))
        rows: list[tuple[str, list[float]]] = []
        for line in lines:
            label, bar, numbers = line.rpartition("|")
            if bar:
                rows.append((label.strip(), []))
            rows[-1][1].extend(map(_number, numbers.split()))
        weights = {label: tuple(row) for label, row in rows if label in ("b", "error", "error3")}
        stages = rows[: len(rows) - len(weights)]
        c = tuple(_number(label) for label, _ in stages)
        a = tuple(tuple(row) for _, row in stages)
        embedded = int(error_order[0]) if error_order else None
        return cls(name, int(order), c, a, error_order=embedded, **weights)

    @property
    def stages(self) -> int:
        return len(self.c)

    @property
    def fsal(self) -> bool:
        """First same as last: the last stage is the velocity at the next state, and so the first
        stage of the next step."""
        return self.stages > 1 and self.c[-1] == 1 and (*self.a[-1], 0) == self.b

    def _check(self, what: str, value: float, right: float) -> None:
        if not abs(value - right) < 1e-13:
            raise ValueError(f"tableau {self.name}: {what} {value!r}, not {right!r}")

    def _order_conditions(self) -> list[tuple[str, float, float]]:
        """(name, value, what it has to be) of each condition up to `order`: one for each rooted
        tree (Hairer II.2, table 2.1)."""
        c, b = self.c, self.b
        ac, ac2 = ([_dot(row, [node**k for node in c]) for row in self.a] for k in (1, 2))
        aac = [_dot(row, ac) for row in self.a]
        cac = [x * y for x, y in zip(c, ac, strict=True)]
        trees = [
            *(
                (k, f"b c^{k - 1} sums to", _dot(b, [node ** (k - 1) for node in c]), 1 / k)
                for k in range(1, self.order + 1)
            ),
            (3, "b a c sums to", _dot(b, ac), 1 / 6),
            (4, "b c a c sums to", _dot(b, cac), 1 / 8),
            (4, "b a c^2 sums to", _dot(b, ac2), 1 / 12),
            (4, "b a a c sums to", _dot(b, aac), 1 / 24),
        ]
        return [tree[1:] for tree in trees if tree[0] <= self.order]


def _dot(weights: Sequence[float], values: Sequence[float]) -> float:
    return math.fsum(weight * value for weight, value in zip(weights, values, strict=False))


def _number(text: str) -> float:
    numerator, _, denominator = text.partition("/")
    return float(numerator) / float(denominator or 1)


# Each method as the books write it: nodes c and the rows of a, the weights b, the error weights.
_METHODS = """
euler, order 1
    0 |
    b | 1

midpoint, order 2
      0 |
    1/2 | 1/2
      b | 0 1

heun2, order 2
    0 |
    1 | 1
    b | 1/2 1/2

ralston, order 2
      0 |
    2/3 | 2/3
      b | 1/4 3/4

kutta3, order 3
      0 |
    1/2 | 1/2
      1 | -1 2
      b | 1/6 2/3 1/6

rk4, order 4
      0 |
    1/2 | 1/2
    1/2 | 0 1/2
      1 | 0 0 1
      b | 1/6 1/3 1/3 1/6

rk38, order 4
      0 |
    1/3 | 1/3
    2/3 | -1/3 1
      1 | 1 -1 1
      b | 1/8 3/8 3/8 1/8

adaptive_heun, order 2, error of order 1
        0 |
        1 | 1
        b | 1/2 1/2
    error | -1/2 1/2

bosh3, order 3, error of order 2
        0 |
      1/2 | 1/2
      3/4 | 0 3/4
        1 | 2/9 1/3 4/9
        b | 2/9 1/3 4/9 0
    error | -0.06944444444444448 0.08333333333333331 1/9 -1/8

dopri5, order 5, error of order 4
        0 |
      1/5 | 1/5
     3/10 | 3/40 9/40
      4/5 | 44/45 -56/15 32/9
      8/9 | 19372/6561 -25360/2187 64448/6561 -212/729
        1 | 9017/3168 -355/33 46732/5247 49/176 -5103/18656
        1 | 35/384 0 500/1113 125/192 -2187/6784 11/84
        b | 35/384 0 500/1113 125/192 -2187/6784 11/84 0
    error | 71/57600 0 -71/16695 71/1920 -17253/339200 22/525 -1/40

tsit5, order 5, error of order 4
                     0 |
                 0.161 | 0.161
                 0.327 | -0.008480655492356989 0.335480655492357
                   0.9 | 2.8971530571054935 -6.359448489975075 4.3622954328695815
    0.9800255409045097 | 5.325864828439257 -11.748883564062828 7.4955393428898365
                         -0.09249506636175525
                     1 | 5.86145544294642 -12.92096931784711 8.159367898576159 -0.071584973281401
                         -0.028269050394068383
                     1 | 0.09646076681806523 0.01 0.4798896504144996 1.379008574103742
                         -3.290069515436081 2.324710524099774
                     b | 0.09646076681806523 0.01 0.4798896504144996 1.379008574103742
                         -3.290069515436081 2.324710524099774 0
                 error | -0.001780011052225777 -0.0008164344596567469 0.007880878010261995
                         -0.1447110071732629 0.5823571654525552 -0.45808210592918697 1/66

dop853, order 8, error of order 7
                      0 |
    0.05260015195876773 | 0.05260015195876773
     0.0789002279381516 | 0.0197250569845379 0.0591751709536137
     0.1183503419072274 | 0.02958758547680685 0 0.08876275643042054
     0.2816496580927726 | 0.2413651341592667 0 -0.8845494793282861 0.924834003261792
                    1/3 | 1/27 0 0 0.17082860872947386 0.12546768756682242
                    1/4 | 19/512 0 0 0.17025221101954405 0.06021653898045596 -9/512
                   4/13 | 13772/371293 0 0 0.17038392571223998 0.10726203044637328 -5688/371293
                          3072/371293
                127/195 | 0.6241109587160757 0 0 -3.3608926294469414 -0.868219346841726
                          27.59209969944671 20.154067550477894 -43.48988418106996
                    0.6 | 0.47766253643826434 0 0 -2.4881146199716677 -0.590290826836843
                          21.230051448181193 15.279233632882423 -33.28821096898486
                          -0.020331201708508627
                    6/7 | -0.9371424300859873 0 0 5.186372428844064 1.0914373489967295
                          -8.149787010746927 -18.52006565999696 22.739487099350505
                          2.4936055526796523 -3.0467644718982196
                      1 | 2.273310147516538 0 0 -10.53449546673725 -2.0008720582248625
                          -17.9589318631188 27.94888452941996 -2.8589982771350235 -8.87285693353063
                          12.360567175794303 0.6433927460157636
                      b | 0.054293734116568765 0 0 0 0 4.450312892752409 1.8915178993145003
                          -5.801203960010585 0.3111643669578199 -0.1521609496625161
                          0.20136540080403034 0.04471061572777259
                  error | 0.01312004499419488 0 0 0 0 -1.2251564463762044 -0.4957589496572502
                          1.6643771824549864 -0.35032884874997366 0.3341791187130175
                          0.08192320648511571 -0.022355307863886294
                 error3 | -0.18980075407240762 0 0 0 0 4.450312892752409 1.8915178993145003
                          -5.801203960010585 -0.4226823213237919 -0.1521609496625161
                          0.20136540080403034 0.02265179219836082
"""
TABLEAUS = {method.name: method for method in map(Tableau.parse, _METHODS.split("\n\n"))}
ALIASES = {
    "heun": "heun2",
    "rk2": "midpoint",
    "rk3": "kutta3",
    "three_eighths": "rk38",
    "heun_euler": "adaptive_heun",
    "bs32": "bosh3",
    "bogacki_shampine": "bosh3",
    "dormand_prince": "dopri5",
    "rk45": "dopri5",
    "tsitouras": "tsit5",
}


def find_tableau(name: str) -> tuple[Tableau, bool]:
    """The tableau that `name` stands for, and whether it is to choose its own steps: so do those
    with an error estimate, unless the name begins with "fixed:" ("fixed:dopri5" takes equal steps).
    ValueError for an unknown name, listing those there are."""
    if isinstance(name, str):
        bare = name.removeprefix("fixed:")
        if (found := TABLEAUS.get(ALIASES.get(bare, bare))) is not None:
            return found, found.error is not None and bare == name
    import difflib

    near = difflib.get_close_matches(str(name), [*TABLEAUS, *ALIASES], 1)
    hint = f" (perhaps {near[0]})" if near else ""
    raise ValueError(
        f"solver must be one of {', '.join(TABLEAUS)}, fixed:NAME or torchdiffeq:NAME, not"
        f" {name!r}{hint}"
    )
