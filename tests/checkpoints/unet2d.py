"""UNet2DModels for tests, and the golden folders of them:  python tests/checkpoints/unet2d.py  (needs diffusers)

Each folder holds what `save_pretrained` wrote and io.npz: noisy pictures, noise levels, labels, and what the library's
own scheduler makes of the network's output, D. Weights are random."""
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = dict(sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8)
UP_DOWN = dict(downsample_type="resnet", upsample_type="resnet")
RESNET = dict(down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
              up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), **UP_DOWN)
CONV = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
CM = dict(TINY, **RESNET, num_class_embeds=5, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=4)
DDPM = dict(TINY, **CONV, attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
            norm_eps=1e-6)
IMAGENET = dict(  # of OpenAI's consistency models on ImageNet 64x64
    sample_size=64, num_class_embeds=1000, block_out_channels=(192, 384, 576, 768), layers_per_block=3,
    attention_head_dim=64, attn_norm_num_groups=32, resnet_time_scale_shift="scale_shift", **UP_DOWN,
    down_block_types=("ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3),
    up_block_types=(*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"))


def unet2d(**config):
    "A UNet2DModel whose every layer has something to say."
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    net = UNet2DModel(**config).eval().requires_grad_(False)
    for p in net.parameters(): p.normal_(0, .7 / p[0].numel() ** .5 if p.ndim > 1 else .2)
    return net


def jump(net, scheduler, x, t, y=None):
    "D of a consistency model, by its scheduler's scalings."
    each = t.view(-1, 1, 1, 1)
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition(each)
    c_in = 1 / (each ** 2 + scheduler.config.sigma_data ** 2) ** .5
    return c_skip * x + c_out * net(c_in * x, torch.from_numpy(scheduler.sigma_to_t(t.numpy())), y).sample


def denoised(net, scheduler, x, j, y=None):
    "D of a DDPM at timestep j, by a step of its scheduler; x as this package scales it."
    a = scheduler.alphas_cumprod[j].sqrt()
    return scheduler.step(net(a * x, j, y).sample, j, a * x).pred_original_sample


def main():
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, DDPMScheduler

    x, y = torch.randn(4, 3, 8, 8, generator=torch.manual_seed(1)), torch.arange(4)
    t = torch.tensor([.002, .3, 5., 80.])
    net, scheduler, at = unet2d(**CM), CMStochasticIterativeScheduler(), GOLDEN / "unet2d_cm"
    ConsistencyModelPipeline(net, scheduler).save_pretrained(at)
    np.savez(at / "io.npz", x=t.view(-1, 1, 1, 1) * x, t=t, y=y, D=jump(net, scheduler, t.view(-1, 1, 1, 1) * x, t, y))
    net, scheduler, at = unet2d(**DDPM), DDPMScheduler(clip_sample=False), GOLDEN / "unet2d_ddpm"
    for part in (net, scheduler): part.save_pretrained(at)  # one folder, as google/ddpm-cifar10-32
    steps = torch.tensor([3, 99, 500, 900])
    t = (1 / (1 - scheduler.betas.double()).cumprod(0) - 1).sqrt()[steps].float()
    x = t.view(-1, 1, 1, 1) * x
    D = torch.cat([denoised(net, scheduler, x[i:i + 1], int(j)) for i, j in enumerate(steps)])
    np.savez(at / "io.npz", x=x, t=t, D=D)


if __name__ == "__main__": main()
