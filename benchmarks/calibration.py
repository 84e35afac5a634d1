"""Calibration of the intervals: how often they hold a planted truth, and how often they call a difference where there is none."""
import argparse
import math

import numpy as np

from benchmarks.timing import Table
from fvlm.core import numpy_generator
from fvlm.evidence.statistics import paired_bootstrap

REPEATS, RESAMPLES, CLIPS, EFFECT = 2000, 1000, 30, 0.05


def planted(
    seeds: int,  # seeds of both arms
    effect: float,  # true difference of the means
    draw: np.random.Generator,  # where the noise comes from
    skewed: bool = False,  # a clip's own noise from a skewed distribution instead of a normal one
) -> tuple[np.ndarray, np.ndarray]:
    "Errors (seeds, clips) of two arms: a clip's hardness shared by both, and noise of seed, of clip and of the cell."
    own = (draw.gamma(2.0, 1.0, CLIPS) - 2.0) / math.sqrt(2.0) if skewed else draw.standard_normal(CLIPS)
    hardness = draw.gamma(2.0, 0.5, CLIPS)
    difference = effect + 0.04 * draw.standard_normal((seeds, 1)) + 0.08 * own + 0.1 * draw.standard_normal((seeds, CLIPS))
    return hardness + difference, np.broadcast_to(hardness, (seeds, CLIPS))


def rates(
    seeds: int,  # seeds of a study
    repeats: int = REPEATS,  # studies
    skewed: bool = False,  # see `planted`
) -> dict[str, float]:
    "Coverage at the planted effect and false calls at none, of the plain crossed bootstrap and of ours."
    held, called = {False: 0, True: 0}, {False: 0, True: 0}
    for number in range(repeats):
        draw = numpy_generator(number, "calibration", seeds, skewed)
        for effect in (EFFECT, 0.0):
            a, b = planted(seeds, effect, draw, skewed)
            for ours in (False, True):
                interval = paired_bootstrap(a, b, resamples=RESAMPLES, small_sample=ours, seed=number)
                if effect:
                    held[ours] += not interval.excludes(effect)
                else:
                    called[ours] += interval.excludes()
    return {"plain coverage": held[False] / repeats, "ours coverage": held[True] / repeats, "plain false calls": called[False] / repeats,
            "ours false calls": called[True] / repeats}


def main(
    repeats: int = REPEATS,  # studies a row
) -> Table:
    "One row a number of seeds; the bars are those of 20 seeds."
    table = Table("calibration")
    for seeds in (20, 5, 3):
        for skewed in (False, True):
            found = rates(seeds, repeats, skewed)
            error = 1.96 * math.sqrt(0.95 * 0.05 / repeats)
            kind = f"{seeds} seeds x {CLIPS} clips{', skewed clips' if skewed else ''}"
            judged = seeds == 20 and not skewed
            for method in ("plain", "ours"):
                cover, calls = found[f"{method} coverage"], found[f"{method} false calls"]
                bar = judged and method == "ours"
                table.fact(f"{kind}, {method}: coverage of a planted effect", f"{cover:.1%} +- {error:.1%}", bar="93 % to 97 %" if bar else "-", holds=not bar or 0.93 <= cover <= 0.97)
                table.fact(f"{kind}, {method}: false calls", f"{calls:.1%} +- {error:.1%}", bar="<= 5.5 %" if bar else "-", holds=not bar or calls <= 0.055)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="studies a row; for example --repeats 200 for a look")
    print(main(parser.parse_args().repeats).markdown())
