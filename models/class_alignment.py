"""Fine-grained adversarial alignment: a discriminator that tells the domains apart class by class.

FADA (Wang, Shen, Zhang, Duan & Mei, ECCV 2020; methods 7.1). Its scores d have 2C channels, source classes first; what
it is asked for at a pixel is the classifier's own soft opinion a of the C classes, in the half of a domain:
[a; 0] says source, [0; a] target. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

Half = Literal["source", "target"]
HALVES: tuple[Half, ...] = get_args(Half)
TEMPERATURE = 1.8
CLIP = 0.9


def soft_encodings(logits: Tensor, temperature: float = TEMPERATURE, clip: float = CLIP) -> Tensor:
    """What the classifier thinks of every pixel, without gradient: a = min(softmax(z / T), clip) (methods 7.1, step 2).

    Args:
        logits: z, float (N, C, H, W).
        temperature: T.
        clip: bound of every entry; they are not normalised again.

    Returns:
        float (N, C, H, W), summing to 1 or less over the classes.
    """
    return (logits.detach() / temperature).softmax(dim=1).clamp_(max=clip)


def alignment_loss(scores: Tensor, encodings: Tensor, half: Half) -> Tensor:
    """The mean over images and pixels of -⟨[a; 0], log softmax d⟩, or [0; a] (methods 7.1, steps 3 and 4).

    The discriminator learns each domain in its own half; the features learn to be taken for the source.

    Args:
        scores: d, float (N, 2C, H, W).
        encodings: a, float (N, C, H, W), from :func:`soft_encodings`.
        half: the half in which the encodings stand.

    Returns:
        A scalar.

    Raises:
        ValueError: for another half, or if the shapes do not fit.
    """
    if half not in HALVES:
        raise ValueError(f"half is {half!r}; choose one of {', '.join(HALVES)}")
    n, classes, *grid = encodings.shape
    if scores.shape != (n, 2 * classes, *grid):
        raise ValueError(
            f"scores {tuple(scores.shape)} and encodings {tuple(encodings.shape)} do not fit; give scores of twice as "
            "many channels on the same grid"
        )
    own = scores[:, :classes] if half == "source" else scores[:, classes:]
    # Σ a (ln Σ exp d - d_own): neither zeros beside the encodings nor log-probabilities of the other half are kept.
    return (encodings.sum(dim=1) * scores.logsumexp(dim=1) - (encodings * own).sum(dim=1)).mean()
