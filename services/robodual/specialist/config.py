"""The specialist's shapes: sensors, widths and sampling."""

from __future__ import annotations

from dataclasses import dataclass

CHUNK = 8  # actions in a chunk
ACTION = 7  # values in an action, and in the proprioception
HISTORY = 4  # executed actions that the control loop keeps
TRAINING_STEPS = 100  # diffusion steps of the training schedule


@dataclass(frozen=True)
class SpecialistConfig:
    """What a specialist reads and how large it is; the defaults are the published ones (RoboDual, section 3.2).

    `with_depth`, `with_gripper` and `with_tactile` are named as in the published training script. The gripper camera
    has colour and depth, so it needs depth. A `guidance_scale` of 1 means no classifier-free guidance: the
    unconditional pass, which it would multiply by zero, is left out.

    Raises:
        ValueError: naming the field, if the values do not fit together.
    """

    with_depth: bool = True
    with_gripper: bool = True
    with_tactile: bool = False
    context_width: int = 4096  # the generalist's hidden size
    image_size: int = 224
    tactile_size: int = 128
    patch_size: int = 16
    vision_width: int = 384
    vision_blocks: int = 12
    vision_heads: int = 6
    depth_width: int = 256  # of the tactile encoder too
    depth_blocks: int = 6
    depth_heads: int = 8
    depth_head_width: int = 64
    width: int = 256  # of the denoiser and the adapters
    blocks: int = 6
    heads: int = 8
    latents: int = 8  # tokens that each adapter makes of one frame
    diffusion_steps: int = 10
    guidance_scale: float = 3.0

    def __post_init__(self) -> None:
        if self.with_gripper and not self.with_depth:
            raise ValueError("with_gripper needs with_depth: the gripper camera is read in colour and depth")
        for size in ("image_size", "tactile_size"):
            value = getattr(self, size)
            if value % self.patch_size:
                raise ValueError(f"{size} must be a multiple of patch_size ({self.patch_size}), not {value}")
        if self.vision_width % self.vision_heads:
            raise ValueError(f"vision_width must be a multiple of vision_heads ({self.vision_heads})")
        if self.width % (4 * self.heads):
            raise ValueError(f"width must be a multiple of 4 * heads ({4 * self.heads}): half a head turns in pairs")
        if not 1 <= self.diffusion_steps <= TRAINING_STEPS:
            raise ValueError(f"diffusion_steps must be 1 to {TRAINING_STEPS}, not {self.diffusion_steps}")

    @classmethod
    def published(
        cls, *, with_depth: bool = True, with_gripper: bool = True, with_tactile: bool = False
    ) -> SpecialistConfig:
        """The shapes of the published checkpoints; the evaluated one reads depth and the gripper camera, no tactile."""
        return cls(with_depth=with_depth, with_gripper=with_gripper, with_tactile=with_tactile)

    @classmethod
    def toy(cls) -> SpecialistConfig:
        """Every part of the published one at test widths: about 15 ms an act on one CPU core."""
        return cls(
            context_width=64,
            image_size=64,
            tactile_size=32,
            vision_width=48,
            vision_blocks=2,
            vision_heads=3,
            depth_width=32,
            depth_blocks=1,
            depth_heads=2,
            depth_head_width=16,
            width=32,
            blocks=2,
            heads=4,
        )

    @classmethod
    def playtable(cls) -> SpecialistConfig:
        """The published architecture, small enough to train on a CPU; without guidance, and half the steps."""
        return cls(
            context_width=160,
            image_size=96,
            tactile_size=96,
            patch_size=12,
            vision_width=96,
            vision_blocks=3,
            vision_heads=3,
            depth_width=48,
            depth_blocks=1,
            depth_heads=3,
            depth_head_width=16,
            width=160,
            blocks=4,
            heads=5,
            guidance_scale=1.0,
            diffusion_steps=5,
        )

    @property
    def sensors(self) -> tuple[str, ...]:
        """The sensors that the model reads, by the names of the wire format."""
        gripper_depth = ("depth_gripper",) if self.with_gripper else ()
        return (
            "rgb_static",
            *(("rgb_gripper",) if self.with_gripper else ()),
            *(("depth_static", *gripper_depth) if self.with_depth else ()),
            *(("rgb_tactile",) if self.with_tactile else ()),
            "proprio",
        )
