"""The verdict of an audit: a word and its reasons, from the numbers alone."""

from collections.abc import Mapping

from .audit_results import RARE, RELEVANT, SIGNIFICANT, ControlResult, DonorFollowing, Verdict
from .probes import Rate
from .statistics import Difference


def judge(
    accuracy: Rate,
    without_span: float,
    controls: Mapping[str, ControlResult],
    donor_following: DonorFollowing | None = None,
) -> Verdict:
    """What follows from the numbers; the rules are in `docs/audit.md`.

    Args:
        accuracy (`Rate`): of the own answers.
        without_span (`float`): share of samples without a span.
        controls (`dict[str, ControlResult]`): `another_sample` decides; others are weighed where they are there.
        donor_following (`DonorFollowing`, *optional*).

    Returns:
        [`Verdict`]: its word is `none`, `used`, `sensitive`, `idle` or `open`.

    Raises:
        ValueError: without the control `another_sample`.
    """
    if "another_sample" not in controls:
        raise ValueError("A verdict needs the control 'another_sample', zeros lie where no model was. Add it.")
    swapped, mean = controls["another_sample"], controls.get("position_mean")
    loss = _points(swapped.difference)
    if without_span > RARE:
        word, first = (
            "none",
            f"{100 * without_span:.0f} % of the samples have no latent span, so latents can do little.",
        )
    elif swapped.falls and swapped.difference.value >= RELEVANT and (mean is None or mean.falls):
        word, first = "used", f"Another sample's latents cost {loss}: what is in the latents matters."
    elif swapped.falls:
        word = "sensitive"
        why = "a mean latent does as well as the own ones" if mean and not mean.falls else "that is little"
        first = f"Another sample's latents cost {loss}, but {why}: answers depend on the latents without need of them."
    elif swapped.difference.high < RELEVANT:
        word = "idle"
        first = f"Another sample's latents cost {loss}; a loss of {100 * RELEVANT:.0f} points or more is ruled out."
    else:
        word, first = "open", f"Another sample's latents cost {loss}: too wide to tell. Ask more questions."
    reasons = [f"The model answers {accuracy} right with its own latents.", first]
    reasons += _further_reasons(controls, donor_following, swapped.falls)
    return Verdict(word, reasons)


def _points(difference: Difference) -> str:
    value, low, high = (100 * number for number in difference)
    return f"{value:.1f} points ({low:.1f} to {high:.1f})"


def _further_reasons(
    controls: Mapping[str, ControlResult], donor_following: DonorFollowing | None, swapped_falls: bool
) -> list[str]:
    reasons = []
    if donor_following is not None:
        follows, stays = donor_following.follows, donor_following.stays
        if follows.low > stays.high:
            said = "answers follow what the last latents say"
        elif stays.low > follows.high:
            said = "answers do not hang on the last latents"
        else:
            said = "neither outweighs the other"
        reasons.append(
            f"With the last span of another sample the answer is that sample's in {follows} and the own right one in "
            f"{stays}: {said}."
        )
    zeros, oracle, silent = (controls.get(name) for name in ("zeros", "oracle", "no_spans"))
    if zeros is not None and zeros.falls and not swapped_falls:
        reasons.append(
            f"Zeros cost {_points(zeros.difference)}, another sample's latents do not: something has to stand there, "
            "whatever it holds."
        )
    if oracle is not None and oracle.difference.value <= -RELEVANT and oracle.p_adjusted < SIGNIFICANT:
        reasons.append(
            f"With what the latents should hold it answers {oracle.accuracy} right: they are used where they are "
            "right, and the model does not yet predict them well."
        )
    if silent is not None and silent.falls:
        reasons.append(f"Without spans it answers {silent.accuracy} right.")
    return reasons
