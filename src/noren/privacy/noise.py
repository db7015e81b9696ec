"""Clipping and Gaussian noise on what leaves.

    x' = x * min(1, C / ||x||_2) + N(0, s^2 I)        C: `Noise.clip`, s: `Noise.scale`, x: one vector (one token)

This is the mechanism alone. Nothing here turns (C, s) into an epsilon, so it comes with no guarantee.
"""

from __future__ import annotations

import hmac
import secrets

import torch
from torch import Tensor

from noren.types import Noise


class Gaussian:
    """Draws from generators of its own, seeded by the system's random source, never from the training's.

    A draw with a name is a function of `secret`, the name and the vectors: made again, it is the same, and for other
    vectors it is another. A draw without a name is always another.
    """

    def __init__(self, noise: Noise, secret: bytes = b"") -> None:
        self.noise = noise
        self._secret = secret or secrets.token_bytes(32)
        self._generator = torch.Generator().manual_seed(secrets.randbits(63))

    def __call__(self, vectors: Tensor, name: str = "") -> Tensor:
        """Return vectors [N, d], each clipped and noised."""
        out = vectors.detach().to("cpu", torch.float32).contiguous()
        generator = self._named(name, out) if name else self._generator
        if self.noise.clip:
            norms = out.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            out = out * (self.noise.clip / norms).clamp(max=1.0)
        if self.noise.scale:
            out = out + torch.randn(out.shape, generator=generator) * self.noise.scale
        return out.to(vectors.dtype).to(vectors.device)

    def _named(self, name: str, vectors: Tensor) -> torch.Generator:
        digest = hmac.new(self._secret, f"{name}\0".encode(), "sha256")
        digest.update(vectors.numpy().tobytes())
        return torch.Generator().manual_seed(int.from_bytes(digest.digest()[:8], "big") >> 1)
