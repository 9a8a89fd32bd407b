"""Distillation: the loss against hand-made numbers, the teacher kept out of everything but the loss."""

import dataclasses
import math
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from foldbit.training import checkpoints, distill, loop, runs
from foldbit.training.distill import TeacherError, distillation_loss, load_teacher
from foldbit.training.recipes import DataConfig, Distillation
from foldbit.training.runs import RunError


def by_hand(student, teacher, label, how):
    """The loss of an image from probabilities, in plain Python."""

    def softmax(logits, temperature):
        powers = [math.exp(z / temperature) for z in logits]
        return [p / sum(powers) for p in powers]

    entropy = -math.log(softmax(student, 1.0)[label])
    p, q = softmax(teacher, how.temperature), softmax(student, how.temperature)
    divergence = how.temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    if how.correct and max(range(len(teacher)), key=teacher.__getitem__) != label:
        return entropy
    return how.weight * divergence + (1 - how.weight) * entropy


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("correct", [False, True])
def test_the_loss_is_that_of_the_formula(temperature, weight, correct):
    how = Distillation("x", temperature, weight, correct)
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 4, dtype=torch.float64), 3 * torch.randn(6, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    right = teacher.argmax(1) == labels
    assert right.any() and not right.all()
    expected = sum(
        by_hand(s, t, y, how)
        for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True)
    )
    assert float(distillation_loss(student, teacher, labels, how)) == pytest.approx(expected / 6, rel=1e-12)


def test_where_the_teacher_is_wrong_the_label_is_learnt():
    """Two images alike to both networks; the teacher is right about one and wrong about the other."""
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    teacher, labels = torch.tensor([[4.0, 0.0], [4.0, 0.0]]), torch.tensor([0, 1])
    distillation_loss(student, teacher, labels, Distillation("x", correct=True)).backward()
    p, t = torch.softmax(torch.tensor([1.0, 0.0]), 0), torch.softmax(torch.tensor([4.0, 0.0]), 0)
    assert torch.allclose(2 * student.grad[0], p - t)  # towards the teacher
    assert torch.allclose(2 * student.grad[1], p - torch.tensor([0.0, 1.0]))  # towards the label, against it
    student.grad = None
    distillation_loss(student, teacher, labels, Distillation("x")).backward()
    assert torch.allclose(student.grad[0], student.grad[1])


def test_the_pull_does_not_depend_on_the_temperature_where_it_is_high():
    """What the factor T² is for (Hinton et al., section 2): the gradient nears (z − t) / classes."""
    teacher, labels = torch.tensor([[0.3, -0.1, 0.2]]), torch.tensor([0])
    for temperature in (20.0, 100.0):
        student = torch.zeros(1, 3, requires_grad=True)
        distillation_loss(student, teacher, labels, Distillation("x", temperature)).backward()
        assert torch.allclose(student.grad, -(teacher - teacher.mean()) / 3, atol=2e-3)


def test_a_perfect_student_has_nothing_to_learn():
    logits = torch.randn(5, 10) * 30  # some probabilities are 0 in float32
    loss = distillation_loss(logits, logits.clone(), logits.argmax(1), Distillation("x", 2.0))
    assert float(loss) == pytest.approx(0, abs=1e-6)


@pytest.fixture
def recipe(tiny, quant, float_run):
    data = DataConfig(name="digits", train_images=192)
    teacher = Distillation(str(float_run[0]), temperature=2.0, weight=0.5, correct=True)
    return dataclasses.replace(tiny, quant=quant, data=data, epochs=1, distill=teacher)


def test_the_teacher_is_frozen_in_evaluation_mode_and_outside(tmp_path, monkeypatch, digits, recipe):
    seen = []
    genuine = distill.load_teacher

    def load(*arguments):
        teacher = genuine(*arguments)
        before = {k: v.clone() for k, v in teacher.state_dict().items()}

        def look(module, inputs, output):
            seen.append(module.training or torch.is_grad_enabled() or output.requires_grad)

        teacher.register_forward_hook(look)
        look.teacher, look.before = teacher, before
        load.look = look
        return teacher

    monkeypatch.setattr(loop.distill, "load_teacher", load)
    outcome = loop.train(recipe, tmp_path / "run", images=digits, threads=1)
    assert seen == [False] * 3  # once a step
    teacher = load.look.teacher
    assert all(torch.equal(v, load.look.before[k]) for k, v in teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    path = checkpoints.newest(tmp_path / "run")
    assert checkpoints.read_weights(path).keys() == outcome.model.state_dict().keys()
    optimized = checkpoints.read_training(path)["optimizer"]["param_groups"][0]["params"]
    assert len(optimized) == len(list(outcome.model.parameters()))
    assert runs.load_run(tmp_path / "run")[1].distill == recipe.distill


def test_the_loop_learns_by_that_loss(tmp_path, monkeypatch, digits, recipe):
    """The loss that is recorded is the formula's, of the very logits that both networks gave."""
    losses = []
    genuine = loop._Training._loss

    def loss(self, logits, x, labels):
        found = genuine(self, logits, x, labels)
        told = self.teacher(x)
        how = self.recipe.distill
        expected = [
            by_hand(s, t, y, how)
            for s, t, y in zip(logits.tolist(), told.tolist(), labels.tolist(), strict=True)
        ]
        losses.append(sum(expected) / len(expected))
        assert float(found.detach()) == pytest.approx(losses[-1], rel=1e-5)
        return found

    monkeypatch.setattr(loop._Training, "_loss", loss)
    outcome = loop.train(recipe, tmp_path / "run", images=digits, threads=1)
    assert outcome.losses[-1]["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_a_student_comes_near_its_teacher(tmp_path, digits, tiny, float_run):
    """With the teacher's answers alone, more so than with the labels alone."""
    teacher = runs.load_run(float_run[0])[0]
    x = (digits.test.images.float() / 255 - digits.mean[0]) / digits.std[0]

    def distance(outcome):
        with torch.no_grad():
            told, learnt = F.log_softmax(teacher(x), 1), F.log_softmax(outcome.model(x), 1)
            return float(F.kl_div(learnt, told, reduction="batchmean", log_target=True))

    small = dataclasses.replace(tiny, seed=1)
    taught = dataclasses.replace(small, distill=Distillation(str(float_run[0])))
    alone = distance(loop.train(small, tmp_path / "a", images=digits, threads=1))
    assert distance(loop.train(taught, tmp_path / "b", images=digits, threads=1)) < 0.8 * alone


def library(monkeypatch, name, build):
    """A stand-in for torchvision or timm, which tests do not need."""
    if name == "timm":
        module = types.ModuleType("timm")
        module.create_model = build
        monkeypatch.setitem(sys.modules, "timm", module)
        return
    package, module = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    module.get_model = build
    package.models = module
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", module)


def flat(classes=10, values=784):
    return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(values, classes))


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_teachers_of_libraries(monkeypatch, recipe, name):
    asked = {}

    def build(model, **options):
        asked.update(options, model=model)
        return flat()

    library(monkeypatch, name, build)
    how = dataclasses.replace(recipe.distill, teacher=f"{name}/net.v1/b")
    teacher = load_teacher(dataclasses.replace(recipe, distill=how), torch.randn(4, 1, 28, 28), 10)
    assert asked == {
        "model": "net.v1/b",
        **({"pretrained": True} if name == "timm" else {"weights": "DEFAULT"}),
    }
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch, recipe, name):
    monkeypatch.setitem(sys.modules, "torchvision.models" if name == "torchvision" else name, None)
    how = dataclasses.replace(recipe.distill, teacher=f"{name}/resnet18")
    with pytest.raises(ValueError, match=rf"{name}.*foldbit\[vision\]"):
        load_teacher(dataclasses.replace(recipe, distill=how), torch.randn(4, 1, 28, 28), 10)


@pytest.mark.parametrize(
    ("built", "message"),
    [
        (lambda: flat(1000), r"does not know these 10 classes: of two images it gives logits \[2, 1000\]"),
        (lambda: flat(10, 3 * 784), r"does not take these images, of shape \[1, 28, 28\]"),
        (lambda: nn.Conv2d(3, 10, 3), r"does not take these images, of shape \[1, 28, 28\]"),
        (lambda: nn.Conv2d(1, 10, 3), r"gives logits \[2, 10, 26, 26\], not \[2, 10\]"),
        (lambda: nn.GRU(28, 10), "does not take these images|gives tuple"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(monkeypatch, tmp_path, digits, recipe, built, message):
    library(monkeypatch, "timm", lambda *_, **__: built())
    how = dataclasses.replace(recipe.distill, teacher="timm/net")
    with pytest.raises(TeacherError, match=message):
        loop.train(dataclasses.replace(recipe, distill=how), tmp_path / "run", images=digits)
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_is_nowhere_is_refused(tmp_path, digits, recipe):
    for teacher, error, message in (
        ("runs/typo", TeacherError, "no folder runs/typo to take a teacher from"),
        (str(tmp_path), RunError, "is not a run folder"),
    ):
        how = dataclasses.replace(recipe.distill, teacher=teacher)
        with pytest.raises(error, match=message):
            loop.train(dataclasses.replace(recipe, distill=how), tmp_path / "run", images=digits)


def test_a_teacher_of_other_data_is_refused(recipe):
    other = dataclasses.replace(recipe, data=DataConfig(name="mnist"))
    with pytest.raises(TeacherError, match="was trained on digits, and this recipe's images are mnist"):
        load_teacher(other, torch.randn(4, 1, 28, 28), 10)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"teacher": ""}, "a run folder"),
        ({"temperature": 0.0}, "temperature must be positive; got 0"),
        ({"temperature": math.inf}, "temperature must be positive"),
        ({"weight": 1.5}, "from 0 to 1; got 1.5"),
        ({"weight": -0.1}, "from 0 to 1"),
    ],
)
def test_settings_in_range(mistake, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**{"teacher": "runs/x", **mistake})
