"""Golden cases of flows: rectified flow sampled, and SiT's interpolants, ODEs, SDEs, likelihood."""

import torch
from case import Case, LinearModel, Tensors
from torch import Tensor

from config.objective import FlowConfig, SamplingConfig
from core.conditions import Condition
from core.types import ModelOutput
from sampling.guidance import Guided
from transport import ode, sde
from transport.objective import Flow, interval
from transport.path import Path
from transport.prediction import (
    TO_SCORE,
    TO_VELOCITY,
    noise_from_velocity,
    score_from_velocity,
    velocity_from_score,
)


class RectifiedFlowSample(Case):
    """out.[two_c_tuple.]<method>.n<steps>.<cfg or nocfg>."""

    def run(self) -> Tensors:
        for *two, method, steps, guided in self.keys("out."):
            key = ".".join(["out", *two, method, steps, guided])
            self.put(key, self.sample(bool(two), method, int(steps[1:]), guided == "cfg"))
        return self.results

    def sample(self, doubled: bool, method: str, steps: int, guided: bool) -> Tensor:
        suffix = "2" if doubled else ""
        model = LinearModel(*self.inputs(*(f"{name}{suffix}" for name in "Abc")))
        z, y, null = self.inputs("z", "y", "y_null")
        by_library = method.startswith("torchdiff-")
        settings = SamplingConfig(
            sampler=method.removeprefix("torchdiff-"),
            num_steps=steps - by_library,  # there N counts the points of the grid
            cfg_scale=self.config["cfg_scale"] if guided else 1.0,
            overshoot=True,
        )
        with torch.no_grad():
            return Flow().sample(
                Guided(model, lambda _: Condition(null), settings), z, y, settings, None
            )


def flow(path: str, prediction: str, weighting: str = "none", regular_eps: float = 0.0) -> Flow:
    """Ours under the published names; SiT keeps no distance for a velocity but in VP."""
    eps = regular_eps if prediction == "velocity" and path != "VP" else None
    return Flow(FlowConfig("flow", path.lower(), prediction, weighting, eps, eps))


def diffusion_form(name: str) -> str:
    """Ours for a published name, one of which has a slip of the pen."""
    return name.lower().replace("inccreasing", "increasing")


class Transport(Case):
    """Cases with the model (A + t D) x + b t + c[y], one set per prediction."""

    def model(self, prediction: str) -> LinearModel:
        weight, slope, offset, table = self.inputs(*(f"{prediction}.{name}" for name in "ADbc"))
        return LinearModel(weight, offset, table, slope)


class Terms(Transport):
    """out.<path>.*, grad.<path>.<prediction>.<weighting>.A."""

    def run(self) -> Tensors:
        for path, *rest in self.keys("out."):
            if rest[0] in ("velocity", "score", "noise"):
                self.prediction(path, *rest)
            else:
                self.path(path, flow(path, "velocity").path, *rest)
        return self.results

    def path(self, name: str, path: Path, what: str, *rest: str) -> None:
        """Schedules, and the identities between velocity, score and noise."""
        t, x1, x0, grid, v, x_grid = self.inputs("t", "x1", "x0", "t_grid", "v", "x_grid")
        x_t = path.interpolate(x1, x0, t)
        if what == "coef":
            found = getattr(path, {"ratio": "growth"}.get(rest[0], rest[0]))(grid)
        elif what == "diffusion":
            norm = float(".".join(rest[1:]).removeprefix("norm"))
            found = sde.DIFFUSIONS[diffusion_form(rest[0])](path, grid, norm)
        else:
            found = {
                "xt": lambda: x_t,
                "ut": lambda: path.velocity(x1, x0, t),
                "drift_mean": lambda: -path.growth(grid).view(-1, 1, 1, 1) * x_grid,
                "drift_var": lambda: path.score_gain(grid),
                "score_from_velocity": lambda: score_from_velocity(path, v, x_t, t),
                "noise_from_velocity": lambda: noise_from_velocity(path, v, x_t, t),
                "velocity_from_score": lambda: velocity_from_score(path, v, x_t, t),
            }[what]()
        self.put(".".join(["out", name, what, *rest]), found)

    def prediction(self, path: str, kind: str, what: str, *rest: str) -> None:
        """Intervals, losses with their gradients, and the fields of a model."""
        key = f"out.{path}.{kind}.{what}"
        t, x1, x0, y, grid = self.inputs("t", "x1", "x0", "y", "t_grid")
        made = flow(path, kind)
        if what == "check_interval":
            self.put(key, torch.tensor(self.intervals(made), dtype=torch.float64))
        elif what == "sampled_t":
            self.put(key, made.time_of(grid[: len(x1)]))
        elif what == "loss":
            model = self.model(kind)
            weighted = flow(path, kind, rest[0].lower())
            terms = weighted.losses_at(model, x1, y, t, x0)
            terms.per_sample.mean().backward()
            self.put(f"{key}.{rest[0]}", terms.per_sample)
            self.put(f"grad.{path}.{kind}.{rest[0]}.A", model.weight.grad)
        else:
            convert = {"score_fn": TO_SCORE, "drift_fn": TO_VELOCITY}[what][kind]
            x_t = made.path.interpolate(x1, x0, t)
            self.put(key, convert(made.path, self.model(kind)(x_t, t, y).prediction, x_t, t))

    def intervals(self, made: Flow) -> list[tuple[float, float]]:
        """One row for each name of the metadata: train, ode, ode_reverse, sde.<form>.last<size>."""
        rows = []
        for name in self.info["check_interval_rows"]:
            if name == "train":
                rows.append(interval(made.config, made.train_eps))
            elif name.startswith("ode"):
                row = interval(made.config, made.sample_eps)
                rows.append(tuple(1 - t for t in row) if name == "ode_reverse" else row)
            else:
                _, form, size = name.split(".", 2)
                last = float(size.removeprefix("last"))
                found = interval(made.config, made.sample_eps, diffusion_form(form), True, last)
                rows.append(found)
        return rows


class Samplers(Transport):
    """out.ode*.*, out.sde.*, out.likelihood.*."""

    def run(self) -> Tensors:
        with torch.no_grad():
            for kind, *rest in self.keys("out."):
                if kind in ("ode", "ode_mid", "ode_reverse"):
                    self.ode(kind, *rest)
                elif kind in ("sde", "sde_before_last"):
                    self.sde(kind, *rest)
                elif rest[1] == "z":
                    self.likelihood(rest[0])
        return self.results

    def grid(self, made: Flow, points: int, reverse: bool = False) -> Tensor:
        low, high = interval(made.config, made.sample_eps)
        return torch.linspace(*((1 - low, 1 - high) if reverse else (low, high)), points)

    def ode(self, kind: str, path: str, prediction: str, method: str) -> None:
        made, (z, y) = flow(path, prediction), self.inputs("z", "y")
        steps = self.config["steps"]["ode"]
        states = ode.solve(
            made.velocity(self.model(prediction), y),
            z,
            self.grid(made, steps, kind == "ode_reverse"),
            method,
            self.config["atol"],
            self.config["rtol"],
            overshoot=True,
            trajectory=True,
        )
        row = steps // 2 if kind == "ode_mid" else -1
        self.put(f"out.{kind}.{path}.{prediction}.{method}", states[row])

    def sde(
        self, kind: str, path: str, prediction: str, method: str, form: str, *last: str
    ) -> None:
        """`num_steps` counts points of a grid, or steps with the last one, which comes to the same.

        `sde_before_last` is the state from which any last step starts.
        """
        made, (z, y, noise) = flow(path, prediction), self.inputs("z", "y", "sde_noise")
        rule = last[0].lower() if last else "none"
        size = self.config["last_step_size"] if last != ("None",) else 0.0
        settings = SamplingConfig(
            sampler={"Euler": "euler_maruyama", "Heun": "stochastic_heun"}[method],
            diffusion_form=diffusion_form(form),
            diffusion_norm=self.config["norm"],
            last_step=rule,
            last_step_size=size,
        )
        times = interval(made.config, made.sample_eps, settings.diffusion_form, True, size)
        grid = torch.linspace(*times, self.config["steps"]["sde"])
        draw = iter(noise).__next__
        x = made.stochastic_path(self.model(prediction), z, y, settings, draw, grid)
        self.put(".".join(["out", kind, path, prediction, method, form, *last]), x)

    def likelihood(self, method: str) -> None:
        a, d, z = self.inputs("lik.a", "lik.d", "z")

        def model(x: Tensor, t: Tensor, cond: None) -> ModelOutput:
            return ModelOutput((a + d * t.view(-1, 1, 1, 1)) * x)

        settings = SamplingConfig(
            sampler=method,
            num_steps=self.config["steps"]["ode"] - 1,
            atol=self.config["atol"],
            rtol=self.config["rtol"],
            overshoot=True,
        )
        logp, noise = Flow().log_likelihood(model, z, None, settings, torch.ones_like(z))
        self.put(f"out.likelihood.{method}.logp", logp)
        self.put(f"out.likelihood.{method}.z", noise)
