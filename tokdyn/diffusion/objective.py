"""Define the training objectives: noise prediction with a learned variance, and the velocity of a straight flow.

The *noise level* used throughout tokdyn is ``sigma / (alpha + sigma)`` with ``x_t = alpha x_0 + sigma noise``. It runs
from 0 (clean) to 1 (noise). For a flow it is the flow time. Equal signal-to-noise ratios have equal noise levels under
both objectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from tokdyn.diffusion.settings import BetaSchedule
from tokdyn.errors import UnsupportedModelError
from tokdyn.limits import TIMESTEPS
from tokdyn.section import Section, at_most

if TYPE_CHECKING:  # an objective is a section of recipes, which are checked before torch is loaded
    import torch
    from torch import Tensor

    from tokdyn.diffusion.schedule import NoiseTables


@dataclass(frozen=True)
class Noised:
    """A batch of noisy images, with what is needed to compute the loss of a prediction for it.

    Attributes:
        x_t: (B, C, H, W) noisy images.
        timestep: (B,) timesteps for the model: int64 in [0, T) for a noise objective, float in [0, T] for a flow.
        noise: (B, C, H, W) noise that was mixed in.
        x0: (B, C, H, W) clean images.
        level: (B,) noise level in [0, 1].
    """

    x_t: Tensor
    timestep: Tensor
    noise: Tensor
    x0: Tensor
    level: Tensor


class Objective(Section):
    """What a model is trained to predict, with the arithmetic that training and sampling share.

    ``noise``: the network predicts the noise of a variance-preserving process (arXiv 2006.11239). With ``learn_sigma``
    it also predicts the variance of each reverse step, by interpolating between a lower and an upper bound
    (arXiv 2102.09672).
    ``flow``: the network predicts the velocity ``noise - x_0`` on the straight path ``x_s = (1 - s) x_0 + s noise``;
    its timestep is ``T s``. A flow has no variance, so ``learn_sigma`` is False.

    Attributes:
        kind: ``noise`` or ``flow``.
        num_train_timesteps: T.
        beta_schedule: schedule of the noise process; unused by a flow.
        learn_sigma: whether the network predicts the variance in a second half of its output channels.
        timestep_sampling: distribution that training draws timesteps from; ``logit_normal`` (arXiv 2403.03206) is for
            a flow only.
    """

    kind: Literal["noise", "flow"] = "noise"
    num_train_timesteps: Annotated[int, Field(ge=2), at_most(TIMESTEPS)] = 1000
    beta_schedule: BetaSchedule = "linear"
    learn_sigma: bool = True
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"

    @model_validator(mode="before")
    @classmethod
    def _flow_learns_no_sigma(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("kind") == "flow":
            return {"learn_sigma": False, **values}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Objective:
        if self.kind == "flow" and self.learn_sigma:
            raise ValueError("a flow objective has no variance to learn: set learn_sigma=false or kind=noise")
        if self.kind == "noise" and self.timestep_sampling == "logit_normal":
            raise ValueError("timestep_sampling=logit_normal is for kind=flow only: use uniform with kind=noise")
        return self

    @property
    def betas(self) -> Tensor:
        """The betas (T,) float64 of the noise process."""
        from tokdyn.diffusion.schedule import betas

        return betas(self.beta_schedule, self.num_train_timesteps)

    def scales(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``alpha`` and ``sigma`` of ``x_t = alpha x_0 + sigma noise``, each (B,) float64, at timesteps (B,)."""
        if self.kind == "flow":
            time = timestep.double() / self.num_train_timesteps
            return 1.0 - time, time
        tables = self._tables(timestep.device)
        return tables.alpha[timestep], tables.sigma[timestep]

    def level(self, timestep: Tensor) -> Tensor:
        """Return the noise levels ``sigma / (alpha + sigma)``, (B,) float32 in [0, 1], at timesteps (B,)."""
        alpha, sigma = self.scales(timestep)
        return (sigma / (alpha + sigma)).float()

    def add_noise(self, x0: Tensor, generator: torch.Generator | None = None) -> Noised:
        """Draw a timestep and noise for every image and mix them in.

        Args:
            x0: (B, C, H, W) clean images or latents.
            generator: draws both; None takes torch's global one. It may be on another device than ``x0``.
        """
        import torch

        device = x0.device if generator is None else generator.device
        timestep = self._draw_timesteps(len(x0), device, generator).to(x0.device)
        noise = torch.randn(x0.shape, generator=generator, device=device, dtype=x0.dtype).to(x0.device)
        return self.mix(x0, noise, timestep)

    def add_own_noise(self, x0: Tensor, keys: Tensor) -> Noised:
        """Draw a timestep and noise for every image from its own key, whatever its batch, and mix them in.

        Args:
            x0: (B, C, H, W) clean images or latents.
            keys: (B,) int64 on the device of ``x0``, see `tokdyn.seeds.image_keys`.
        """
        from tokdyn import draws
        from tokdyn.seeds import Draw

        noise = draws.normal(keys, x0[0].numel(), Draw.NOISE).view(x0.shape).to(x0.dtype)
        if self.kind == "noise":
            timestep = draws.integers(keys, 1, self.num_train_timesteps, Draw.TIMESTEP)
        elif self.timestep_sampling == "uniform":
            timestep = draws.uniform(keys, 1, Draw.TIMESTEP) * self.num_train_timesteps
        else:
            timestep = draws.normal(keys, 1, Draw.TIMESTEP).sigmoid() * self.num_train_timesteps
        return self.mix(x0, noise, timestep[:, 0])

    def mix(self, x0: Tensor, noise: Tensor, timestep: Tensor) -> Noised:
        """Mix ``noise`` into ``x0``, both (B, C, H, W), at ``timestep`` (B,)."""
        alpha, sigma = (_column(scale, x0) for scale in self.scales(timestep))
        return Noised(alpha * x0 + sigma * noise, timestep, noise, x0, self.level(timestep))

    def loss(self, output: Tensor, noised: Noised) -> Tensor:
        """Compute the loss of each sample.

        It is the mean squared error over all dimensions. With a learned variance, the variational bound in bits per
        dimension times T / 1000 is added; its gradient reaches the variance alone (arXiv 2102.09672, section 3.1, with
        the weight of its public code, which DiT uses too).

        Args:
            output: (B, C or 2C, H, W) network output for ``noised.x_t``. A flow ignores a second half of channels.
            noised: the batch that the network was given.

        Returns:
            (B,) float32, or float64 for float64 images.
        """
        prediction, variance = self.split(output, noised.x0.shape[1])
        target = noised.noise if self.kind == "noise" else noised.noise - noised.x0
        loss = (prediction - target).square().flatten(1).mean(dim=1)
        if self.learn_sigma and variance is not None:
            loss = loss + self._bound(prediction.detach(), variance, noised) * (self.num_train_timesteps / 1000.0)
        return loss

    def split(self, output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        """Split a network output into the prediction and the variance.

        Args:
            output: (B, C or 2C, H, W).
            channels: C.

        Returns:
            Prediction and variance, each (B, C, H, W) in float32 or float64; the variance is None without learn_sigma.

        Raises:
            UnsupportedModelError: the number of channels is not what this objective needs.
        """
        returned = output.shape[1]
        allowed = {channels, 2 * channels} if self.kind == "flow" else {channels * (1 + self.learn_sigma)}
        if returned not in allowed:
            raise UnsupportedModelError(
                f"The model returned {returned} channels for images with {channels}, but a {self.kind} objective with "
                f"learn_sigma={self.learn_sigma} needs {min(allowed)}: build the model with the same learn_sigma."
            )
        output = output.float() if output.dtype.itemsize < 4 else output
        return output[:, :channels], output[:, channels:] if self.learn_sigma else None

    def predict_x0(self, prediction: Tensor, x_t: Tensor, timestep: Tensor) -> Tensor:
        """Return the clean images that a prediction for ``x_t`` implies, all (B, C, H, W), at timesteps (B,)."""
        alpha, sigma = (_column(scale, x_t) for scale in self.scales(timestep))
        return x_t - sigma * prediction if self.kind == "flow" else (x_t - sigma * prediction) / alpha

    def prediction_for(self, x0: Tensor, x_t: Tensor, timestep: Tensor) -> Tensor:
        """Return the prediction that implies the clean images ``x0``; the inverse of `predict_x0`."""
        alpha, sigma = (_column(scale, x_t) for scale in self.scales(timestep))
        return (x_t - x0) / sigma if self.kind == "flow" else (x_t - alpha * x0) / sigma

    def log_variance(self, variance: Tensor, timestep: Tensor) -> Tensor:
        """Return the log variance (B, C, H, W) of the reverse step, as predicted (arXiv 2102.09672, eq. 15).

        Args:
            variance: (B, C, H, W), the second half of the network's output: -1 stands for the lower bound of the log
                variance and 1 for the upper one.
            timestep: (B,) int64.
        """
        tables = self._tables(variance.device)
        low, high = (_column(table[timestep], variance) for table in (tables.log_min, tables.log_max))
        share = (variance + 1.0) / 2.0
        return share * high + (1.0 - share) * low

    def _bound(self, prediction: Tensor, variance: Tensor, noised: Noised) -> Tensor:
        """Return the variational bound (B,) in bits per dimension."""
        from tokdyn.diffusion.variational import bound_bits

        tables, x0, x_t, timestep = self._tables(noised.x0.device), noised.x0, noised.x_t, noised.timestep
        weight_x0, weight_xt, log_posterior = (
            _column(table[timestep], x0) for table in (tables.posterior_x0, tables.posterior_xt, tables.log_min)
        )
        return bound_bits(
            x0,
            weight_x0 * x0 + weight_xt * x_t,
            log_posterior,
            weight_x0 * self.predict_x0(prediction, x_t, timestep) + weight_xt * x_t,
            self.log_variance(variance, timestep),
            timestep == 0,
        )

    def _tables(self, device: torch.device) -> NoiseTables:
        """Return the constants of the noise process on a device."""
        from tokdyn.diffusion.schedule import noise_tables

        return noise_tables(self.beta_schedule, self.num_train_timesteps, device)

    def _draw_timesteps(self, count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Draw timesteps (count,) from the distribution of training."""
        import torch

        if self.kind == "noise":
            return torch.randint(self.num_train_timesteps, (count,), generator=generator, device=device)
        if self.timestep_sampling == "uniform":
            time = torch.rand(count, generator=generator, device=device)
        else:
            time = torch.randn(count, generator=generator, device=device).sigmoid()
        return time * self.num_train_timesteps


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Return values (B,) in the dtype of ``like`` (B, ...), reshaped to (B, 1, ...) so that they broadcast to it."""
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))
