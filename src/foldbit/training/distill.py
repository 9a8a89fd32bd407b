"""Distillation: a trained network, the teacher, says how likely each class is, and the student learns that.

The loss of an image, of logits z of the student and t of the teacher, at temperature T and weight w, is

    w · T² · KL(softmax(t / T) ‖ softmax(z / T)) + (1 − w) · cross-entropy(z, label)

and a batch's is the mean over its images. The factor T² is that of Hinton, Vinyals & Dean (arXiv 1503.02531,
section 2): the divergence's gradients shrink as 1/T², and the factor undoes it, so that w means the same at
any temperature. The code of the paper whose experiments these recipes repeat (Pouransari et al., arXiv
2001.02786) has the same factor and takes the same mean.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldbit.models import pretrained
from foldbit.training import runs
from foldbit.training.recipes import Distillation, Recipe


class TeacherError(ValueError):
    """A teacher cannot be had, or cannot teach this student."""


def distillation_loss(logits: Tensor, teacher_logits: Tensor, labels: Tensor, how: Distillation) -> Tensor:
    """The mean loss of a batch, as the formula above has it.

    Args:
        logits: of the student, ``[N, classes]``.
        teacher_logits: of the teacher, likewise.
        labels: int64 ``[N]``.
        how: temperature and weight; with ``correct``, an image that the teacher classifies wrong counts its
            cross-entropy alone.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> right, wrong = torch.tensor([0]), torch.tensor([1])
        >>> how = Distillation("runs/teacher", correct=True)
        >>> f"{distillation_loss(student, teacher, right, how):.4f}"  # log 2 less the teacher's entropy
        '0.3278'
        >>> f"{distillation_loss(student, teacher, wrong, how):.4f}"  # log 2
        '0.6931'
    """
    told = F.log_softmax(teacher_logits / how.temperature, 1)
    learnt = F.log_softmax(logits / how.temperature, 1)
    divergence = how.temperature**2 * F.kl_div(learnt, told, reduction="none", log_target=True).sum(1)
    entropy = F.cross_entropy(logits, labels, reduction="none")
    loss = how.weight * divergence + (1 - how.weight) * entropy
    if how.correct:
        loss = torch.where(teacher_logits.argmax(1) == labels, loss, entropy)
    return loss.mean()


def load_teacher(recipe: Recipe, images: Tensor, classes: int) -> nn.Module:
    """The recipe's teacher, frozen and in evaluation mode, after it has been seen to fit the data.

    Args:
        recipe: whose ``distill`` names it.
        images: some of those that it will see, ``[N, C, H, W]``.
        classes: how many the data have.

    Raises:
        TeacherError: where there is none of that name, or it was trained on other data, other classes or
            images of another shape.
        RunError: where it is a run folder that cannot be used.
        PretrainedError: where a library, or its weights, cannot be had.
    """
    assert recipe.distill is not None
    name = recipe.distill.teacher
    teacher = _find(name, recipe.data.name).eval().requires_grad_(False)
    try:
        with torch.no_grad():
            logits = teacher(images[:2])
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TeacherError(
            f"the teacher {name} does not take these images, of shape {list(images.shape[1:])} ({reason}); "
            "pick one that was trained on images of that shape"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] != classes:
        given = f"logits {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise TeacherError(
            f"the teacher {name} does not know these {classes} classes: of two images it gives {given}, not "
            f"{[2, classes]}; pick one that was trained on these classes"
        )
    return teacher


def _find(name: str, data: str) -> nn.Module:
    if Path(name).is_dir():
        model, recipe = runs.load_run(name)
        if recipe.data.name != data:
            raise TeacherError(
                f"the teacher {name} was trained on {recipe.data.name}, and this recipe's images are {data}: "
                "its classes would mean other things; pick a teacher of the same data"
            )
        return model
    library, slash, rest = name.partition("/")
    if not slash or library not in pretrained.LIBRARIES:
        raise TeacherError(
            f"there is no folder {name} to take a teacher from; name a run folder, torchvision/NAME or "
            "timm/NAME"
        )
    return pretrained.network(library, rest)
