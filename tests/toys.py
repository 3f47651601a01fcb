"""Toy methods of about thirty lines each: whatever a method of the suite may need must be possible without touching the frame."""

import json
import os
import signal
import subprocess
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytorch_lightning as pl
import torch
from torch import nn

from lesionbench.checkpoint import load_method
from lesionbench.errors import SuiteError
from lesionbench.prediction import Prediction
from lightning_modules.base import Method
from lightning_modules.segmentation import SegmentationMethod
from lightning_modules.semi_supervised.base import SemiSupervised
from lightning_modules.semi_supervised.teachers import Teacher as MovingAverage


def small_net(in_channels: int, out_channels: int, width: int = 4) -> nn.Module:
    """Two convolutions with dropout between them, so that randomness in training matters. No normalization."""
    return nn.Sequential(
        nn.Conv3d(in_channels, width, 3, padding=1), nn.ReLU(), nn.Dropout3d(0.2), nn.Conv3d(width, out_channels, 3, padding=1)
    )


def plain_net(in_channels: int, out_channels: int) -> nn.Module:
    """Without dropout, for exact comparisons between process counts."""
    return nn.Sequential(nn.Conv3d(in_channels, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, out_channels, 3, padding=1))


class Branches(SegmentationMethod):
    """Three branches with fusion: each is a member of the prediction, their mean is the prediction."""

    def __init__(self, task, *, network, **options):
        super().__init__(task, network=network, **options)
        self.network = nn.ModuleDict({name: network(len(task.channels), self.target.out_channels) for name in ("s", "p", "v")})

    def training_step(self, batch, batch_idx):
        target = self.target.encode(batch["label"])
        return sum(self.loss(branch(batch["image"]), target) for branch in self.network.values())

    def predict_maps(self, view):
        maps = {name: self.target.activate(branch(view)) for name, branch in self.network.items()}
        return {**maps, "probabilities": sum(maps.values()) / len(maps)}

    def predict_case(self, batch):
        maps = self.inferer(batch["image"], self.predict_maps, self.task.slice_axis)
        members = {name: self.decode(maps[name]) for name in self.network}
        spread = torch.stack([m.regions[0] for m in members.values()]).std(dim=0)
        return replace(self.decode(maps["probabilities"]), members=members, uncertainty={"spread": spread})


class Adversarial(SegmentationMethod):
    """Two optimizers, stepped by hand: a network and a critic that judges its probabilities."""

    def __init__(self, task, **options):
        super().__init__(task, **options)
        self.automatic_optimization = False
        self.critic = nn.Conv3d(self.target.out_channels, 1, 1)

    def optimizer_groups(self):
        return {"network": list(self.network.parameters()), "critic": list(self.critic.parameters())}

    def training_step(self, batch, batch_idx):
        target = self.target.encode(batch["label"])
        truth = nn.functional.one_hot(target[:, 0].clamp(min=0), self.target.out_channels).movedim(-1, 1).float()
        with self.optimizing("network") as step:
            logits = self(batch["image"])
            step(self.loss(logits, target) - 0.1 * self.critic(self.target.activate(logits)).mean())
        with self.optimizing("critic") as step:
            step(self.critic(self.target.activate(logits.detach())).mean() - self.critic(truth).mean())


class Teacher(SegmentationMethod):
    """Two streams, an EMA teacher, and pseudo labels that it renews in the map store after every epoch."""

    streams = ("labeled", "unlabeled")
    writes_maps = ("pseudo",)

    def __init__(self, task, **options):
        super().__init__(task, **options)
        self.teacher = deepcopy(self.network).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        assert "label" not in unlabeled
        assert "attributes" not in unlabeled
        loss = self.loss(self(labeled["image"]), self.target.encode(labeled["label"]))
        if "pseudo" in unlabeled:
            loss = loss + self.loss(self(unlabeled["image"]), unlabeled["pseudo"].long())
        self.log_terms(loss=loss, pseudo=torch.tensor(float("pseudo" in unlabeled)))
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        for slow, fast in zip(self.teacher.parameters(), self.network.parameters(), strict=True):
            slow.lerp_(fast.detach(), 0.1)

    def on_train_epoch_end(self):
        super().on_train_epoch_end()
        data = self.trainer.datamodule
        for batch in data.case_loader(data.parts["unlabeled"]):
            with torch.no_grad():
                maps = self.inferer(batch["image"], lambda view: {"probabilities": self.target.activate(self.teacher(view))}, 2)
            data.maps.write("pseudo", batch["case"][0], self.decode(maps["probabilities"]).labels[None].numpy())
        self.trainer.strategy.barrier()
        if self.trainer.is_global_zero:
            data.maps.commit("pseudo")
        self.trainer.strategy.barrier()


class TwoHeads(nn.Module):
    """Logits of a network and, from them, those of a second head."""

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.network, self.head = network, nn.Conv2d(classes, classes, 1)
        self.dimensions, self.divisor = network.dimensions, network.divisor

    def forward(self, image):
        logits = self.network(image)
        return {"logits": logits, "second": self.head(logits)}


class AdversarialHeads(SemiSupervised):
    """Semi-supervised with several heads, a critic that has an optimizer of its own, and a teacher beside them."""

    terms: ClassVar = {"fooling": 0.1, "heads": 1.0}

    def __init__(self, task, *, network, **options):
        super().__init__(task, network=lambda **sizes: TwoHeads(network(**sizes), sizes["out_channels"]), **options)
        self.automatic_optimization = False
        self.critic = nn.Conv2d(self.target.out_channels, 1, 1)
        self.teacher = MovingAverage(self.network, 0.1)

    def optimizer_groups(self):
        return {"network": list(self.network.parameters()), "critic": list(self.critic.parameters())}

    def training_step(self, batch, batch_idx):
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        with self.optimizing("network") as step:
            mine, others = self.together(self.network, labeled["image"], unlabeled["image"])
            fooling = -self.critic(self.probabilities(others)).mean()
            heads = (self.probabilities(others) - others["second"].softmax(1)).square().mean()
            step(self.total({"supervised": self.supervised(mine, labeled), "fooling": fooling, "heads": heads}))
        with self.optimizing("critic") as step:
            judged = [self.critic(self.probabilities(output).detach()).mean() for output in (mine, others)]
            step(judged[1] - judged[0])


class Chatty(SegmentationMethod):
    """Logs what it measured when training starts, and a value of every batch that has no iteration beside it."""

    def on_fit_start(self):
        super().on_fit_start()
        for logger in self.loggers:
            logger.log_metrics({"train/measured": 0.5, "iteration": float(self.iteration)}, step=self.iteration)

    def training_step(self, batch, batch_idx):
        loss = self.loss(self(batch["image"]), self.target.encode(batch["label"]))
        self.log("train/extra", loss.detach() ** 2)
        self.log("train/loss", loss.detach())
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        for logger in self.loggers:
            logger.log_metrics({"train/told": float(self.iteration)}, step=self.iteration)


class ManyRaters(SegmentationMethod):
    """Learns from every rater a case has; the number differs between cases."""

    def training_step(self, batch, batch_idx):
        logits = self(batch["image"])
        losses = []
        for b in range(len(logits)):
            raters = batch["raters"][b][batch["rater_mask"][b]]
            losses += [self.loss(logits[b : b + 1], rater[None, None].long()) for rater in raters]
        return torch.stack(losses).mean()


class Brightness(Method):
    """Nothing to train: the score is the first channel, the mask its voxels above a threshold."""

    def __init__(self, task, threshold: float = 1.0, **options):
        super().__init__(task, **options)
        self.threshold = threshold

    def predict_case(self, batch):
        score = batch["image"][0, 0]
        return Prediction(
            scores=score, labels=(score > self.threshold).to(torch.int8), table={"bright": float((score > self.threshold).sum())}
        )


def fit_threshold(cfg, folder: Path) -> Path:
    """The second stage of a two-stage procedure: a threshold from the reconstruction errors of the network of the first."""
    network, _ = load_method(cfg.first, trust=["tests"])
    weight = sum(float(p.detach().abs().mean()) for p in network.parameters())
    path = folder / "threshold.json"
    path.write_text(json.dumps({"threshold": weight}))
    return path


def refuse(cfg, folder: Path) -> Path:
    """A first stage that finds a mistake before it has done anything."""
    raise SuiteError("this cannot be computed")


class FromStage(Brightness):
    """The last stage: applies what the second one found."""

    def __init__(self, task, found: str, **options):
        super().__init__(task, threshold=json.loads(Path(found).read_text())["threshold"], **options)


class FromContents(Brightness):
    """The same with what stands in the file."""

    def __init__(self, task, found, **options):
        if not isinstance(found, dict):
            raise SuiteError(f"model.found={found}: expected a mapping with `threshold`")
        super().__init__(task, threshold=found["threshold"], **options)


class Ensemble(Method):
    """Mean of methods that each preprocess the raw case in their own way; meets on the native grid."""

    def __init__(self, task, checkpoints, **options):
        super().__init__(task, **options)
        self.loaded = [load_method(c, trust=["tests"]) for c in checkpoints]

    def predict_case(self, batch):
        from datamodules import Preprocessing

        predictions = []
        for method, own in self.loaded:
            view = self.trainer.datamodule.case_batch(
                batch["case"][0], method.task, Preprocessing.from_dict(own["preprocessing"]), own["statistics"]
            )
            with torch.no_grad():
                predictions.append(method.to_native(method.predict_case(view), view["geometry"][0]))
        mean = sum(p.regions for p in predictions) / len(predictions)
        decoder = self.loaded[0][0].target
        return Prediction(regions=mean, labels=decoder.labels(mean[None])[0], members={f"m{i}": p for i, p in enumerate(predictions)})

    def to_native(self, prediction, geometry):
        return prediction


class CaseClassifier(Method):
    """One answer per case: whether an attribute is above a threshold, from the mean of each channel."""

    def __init__(self, task, attribute: str = "age", above: float = 60.0, **options):
        super().__init__(task, **options)
        self.attribute, self.above = attribute, above
        self.linear = nn.Linear(len(task.channels), 1)

    def truth(self, batch):
        return torch.tensor([float(a[self.attribute] > self.above) for a in batch["attributes"]])

    def training_step(self, batch, batch_idx):
        logit = self.linear(batch["image"].flatten(2).mean(-1))[:, 0]
        return nn.functional.binary_cross_entropy_with_logits(logit, self.truth(batch))

    def predict_case(self, batch):
        return Prediction(table={"probability": float(self.linear(batch["image"].flatten(2).mean(-1)).sigmoid())})

    def measure(self, prediction, truth, batch, metrics, spacing):
        right = (prediction.table["probability"] > 0.5) == bool(self.truth(batch)[0])
        return [{"member": "", "region": "", **prediction.table, "accuracy": float(right)}]


class KillAt(pl.Callback):
    """Kills the process at once after so many batches."""

    def __init__(self, iteration: int, how: int = signal.SIGKILL) -> None:
        self.iteration, self.how = iteration, how

    def on_train_batch_end(self, trainer, pl_module, *_):
        if pl_module.iteration == self.iteration:
            os.kill(os.getpid(), self.how)


def signal_group(how):
    """Sends a signal to every process of the group, from a process outside of it."""
    subprocess.run(["kill", f"-{int(how)}", "--", f"-{os.getpgrp()}"], start_new_session=True, check=True)


class SignalsGroup(pl.Callback):
    """Sends a signal to all processes of the group, as `timeout`, schedulers and Ctrl-C do, the first time that `hook` is reached."""

    def __init__(self, hook: str, how: int, iteration: int = 0) -> None:
        self.how, self.iteration = how, iteration
        setattr(self, hook, self._send)

    def _send(self, trainer, pl_module, *_, **__):
        if pl_module.iteration >= self.iteration and self.how and trainer.is_global_zero:
            how, self.how = self.how, 0
            signal_group(how)


class PreemptedOnce(KillAt):
    """What SLURM does to a job, unless it has been queued again already."""

    def on_train_batch_end(self, *arguments):
        if "SLURM_RESTART_COUNT" not in os.environ:
            super().on_train_batch_end(*arguments)


class MeanCE(nn.Module):
    """Cross-entropy averaged over all voxels: the mean over two equal batches is the mean over both."""

    kind = "softmax"

    def forward(self, logits, target):
        return nn.functional.cross_entropy(logits, target[:, 0])
