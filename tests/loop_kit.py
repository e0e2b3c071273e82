"""The loop on small models: a plan, a job, its weights; for the tests of its arithmetic."""

from dataclasses import replace

import torch
from conftest import make_model
from method_kit import SETTINGS

from ftune import optimizers, train
from ftune.engine import Engine
from ftune.methods import METHODS
from ftune.methods.base import trainable
from ftune.objectives import sft
from ftune.recipe import TrainingSection


def plan(steps=1, packing=True, **training):
    settings = {"learning_rate": 0.1, "batch_size": 8, "optimizer": "sgd", "warmup": 0.0, "schedule": "constant"}
    section = TrainingSection(max_steps=steps, **(settings | training))
    return train.TrainingPlan(section, steps, packing, "auto", 0)


def job(model, plan, method="full", objective=sft):
    made = train.Job(model, METHODS[method], objective, optimizers.make_optimizer(model, plan.training), Engine())
    return replace(made, found=train.begin_finding(model, plan))


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in trainable(model).items()}


def lora(dtype=torch.float32, dropout=0.0):
    model = make_model().to(dtype)
    METHODS["lora"].attach(model, SETTINGS["lora"].model_copy(update={"dropout": dropout}))
    return model
