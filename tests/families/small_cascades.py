"""Tiny checkpoints of pipelines with several ways out of noise: a prior and a decoder, superresolution."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.deprecated.unclip import UnCLIPPipeline, UnCLIPTextProjModel
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.families.small import tokenizer
from tests.tiny import clip, conditional_unet, kl_autoencoder

# What published checkpoints have for classes that diffusers itself no longer saves so that it could load them.
LIBRARIES = {
    "LDMBertModel": "latent_diffusion", "PaellaVQModel": "wuerstchen", "UnCLIPTextProjModel": "unclip",
    "WuerstchenDiffNeXt": "wuerstchen", "WuerstchenPrior": "wuerstchen",
}  # fmt: skip
WIDTH = 16  # of CLIP's embedding of a picture and of a text


def save(folder: Path, kind: Any, **components: Any) -> Any:
    """Save a pipeline of diffusers' class ``kind``, as its published checkpoints are; return it."""
    for part in components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe = kind(**components)
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    for value in index.values():
        if isinstance(value, list) and value[1] in LIBRARIES:
            value[0] = LIBRARIES[value[1]]
    (folder / "model_index.json").write_text(json.dumps(index))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prior() -> Any:
    """A prior of embeddings ``WIDTH`` wide, with a mean and deviation of them."""
    model = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=WIDTH, num_embeddings=77,
        additional_embeddings=4,
    )  # fmt: skip
    for weight in (model.clip_mean, model.clip_std, model.positional_embedding, model.prd_embedding):
        weight.data.normal_()
    return model


def text_encoder(words: Any) -> Any:
    """A CLIP text encoder of one layer."""
    return clip(len(words), projected=True, projection_dim=WIDTH, hidden_size=WIDTH, num_hidden_layers=1)


def vision() -> Any:
    """A CLIP image encoder."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16,
            patch_size=8, projection_dim=WIDTH,
        )
    )  # fmt: skip


def kandinsky(folder: Path) -> Any:
    """Kandinsky 2.2 with prior and decoder in one folder."""
    torch.manual_seed(3)
    words = tokenizer(folder, "words")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=8, block_out_channels=(16, 32), layers_per_block=1,
        cross_attention_dim=16, attention_head_dim=8, norm_num_groups=8, encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="image_proj", addition_embed_type="image", resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )  # fmt: skip
    movq = diffusers.VQModel(
        block_out_channels=(32, 32), norm_num_groups=8, norm_type="spatial", num_vq_embeddings=16, vq_embed_dim=4,
        latent_channels=4, down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    )  # fmt: skip
    return save(
        folder, diffusers.KandinskyV22CombinedPipeline, unet=unet, movq=movq, prior_prior=prior(),
        scheduler=diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, variance_type="learned_range", clip_sample=True, clip_sample_range=2.0,
        ),
        prior_image_encoder=vision(),
        prior_text_encoder=text_encoder(words),
        prior_tokenizer=words, prior_image_processor=CLIPImageProcessor(size=16),
        prior_scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
    )  # fmt: skip


def unclip(folder: Path) -> Any:
    """unCLIP: a picture of 8 x 8, made larger to 16 x 16."""
    torch.manual_seed(4)
    words = tokenizer(folder, "words")
    decoder = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=6, block_out_channels=(16, 32), layers_per_block=1,
        cross_attention_dim=16, attention_head_dim=8, norm_num_groups=8, class_embed_type="identity",
        resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )  # fmt: skip
    text_proj = UnCLIPTextProjModel(
        clip_extra_context_tokens=2, clip_embeddings_dim=WIDTH, time_embed_dim=64, cross_attention_dim=16
    )
    text_proj.learned_classifier_free_guidance_embeddings.data.normal_()
    larger = [
        diffusers.UNet2DModel(
            sample_size=16, in_channels=6, out_channels=3, layers_per_block=1, block_out_channels=(16,),
            norm_num_groups=8, down_block_types=("ResnetDownsampleBlock2D",),
            up_block_types=("ResnetUpsampleBlock2D",), add_attention=False, resnet_time_scale_shift="scale_shift",
        )
        for _ in range(2)
    ]  # fmt: skip
    learned = {"variance_type": "learned_range", "prediction_type": "epsilon", "clip_sample_range": 1.0}
    return save(
        folder, UnCLIPPipeline, prior=prior(), decoder=decoder, text_proj=text_proj, super_res_first=larger[0],
        super_res_last=larger[1], tokenizer=words,
        text_encoder=text_encoder(words),
        prior_scheduler=diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0),
        decoder_scheduler=diffusers.UnCLIPScheduler(**learned),
        super_res_scheduler=diffusers.UnCLIPScheduler(clip_sample_range=1.0),
    )  # fmt: skip


def consistency_decoder(folder: Path) -> Any:
    """An autoencoder with a consistency decoder, 2 pixels for each latent; saved alone."""
    torch.manual_seed(5)
    vae = diffusers.ConsistencyDecoderVAE(
        latent_channels=4, sample_size=16, encoder_block_out_channels=(8, 16), encoder_layers_per_block=1,
        encoder_norm_num_groups=4, encoder_down_block_types=("DownEncoderBlock2D",) * 2,
        decoder_block_out_channels=(16, 16), decoder_layers_per_block=1, decoder_norm_num_groups=4,
        decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2,
    )  # fmt: skip
    vae.save_pretrained(folder)
    return vae


def stable_diffusion(folder: Path, vae: Any = None) -> Any:
    """Stable Diffusion 1, whose pictures the consistency decoder was made for; its autoencoder may be one with it."""
    torch.manual_seed(6)
    words = tokenizer(folder, "words")
    components = {
        "text_encoder": clip(len(words)), "tokenizer": words, "unet": conditional_unet(sample_size=8),
        "scheduler": diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        "safety_checker": None, "feature_extractor": None,
        "requires_safety_checker": False,
    }  # fmt: skip
    return save(folder, diffusers.StableDiffusionPipeline, vae=vae or kl_autoencoder(2), **components)


def decoded(folder: Path) -> Any:
    """Stable Diffusion beside a consistency decoder for it, and diffusers' pipeline with both."""
    pipe = stable_diffusion(folder)
    pipe.register_modules(vae=consistency_decoder(folder.with_name("decoder")))
    return pipe


def cascade_unet(**options: Any) -> Any:
    """A UNet of Stable Cascade's with two levels; what it starts training with at zero is random."""
    model = diffusers.StableCascadeUNet(
        conditioning_dim=16, block_out_channels=(16, 16), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1), down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(1, 1),
        timestep_ratio_embedding_dim=16, clip_text_pooled_in_channels=WIDTH, clip_seq=2, **options,
    )  # fmt: skip
    for name, weight in model.named_parameters():
        if name.endswith(("gamma", "beta")):
            weight.data.normal_()
    return model.eval()


def paella() -> Any:
    """Paella's VQ autoencoder, 4 pixels for each latent; what it starts training with at zero is random."""
    vqgan = PaellaVQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=16)
    for name, weight in vqgan.named_parameters():
        if name.endswith("gammas"):
            weight.data.normal_()
    return vqgan


def stable_cascade(folder: Path) -> Any:
    """Stable Cascade with prior and decoder in one folder, for a picture of 128 x 128."""
    torch.manual_seed(8)
    words = tokenizer(folder, "words")
    encoder = text_encoder(words)
    layers = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    prior = cascade_unet(
        in_channels=8, out_channels=8, patch_size=1, clip_text_in_channels=WIDTH, clip_image_in_channels=8,
        block_types_per_layer=(layers, layers), switch_level=(False,),
    )  # fmt: skip
    decoder = cascade_unet(
        in_channels=4, out_channels=4, patch_size=2, effnet_in_channels=8, self_attn=False,
        block_types_per_layer=(layers[:2], layers), timestep_conditioning_type=("sca",),
    )  # fmt: skip
    return save(
        folder, diffusers.StableCascadeCombinedPipeline, tokenizer=words, text_encoder=encoder, decoder=decoder,
        scheduler=diffusers.DDPMWuerstchenScheduler(), vqgan=paella(), prior_prior=prior, prior_tokenizer=words,
        prior_text_encoder=encoder, prior_scheduler=diffusers.DDPMWuerstchenScheduler(),
    )  # fmt: skip


def wuerstchen(folder: Path) -> Any:
    """Würstchen with prior and decoder in one folder, two text encoders among them, for a picture of 128 x 128."""
    torch.manual_seed(9)
    words = tokenizer(folder, "words")
    prior = WuerstchenPrior(c_in=8, c=16, c_cond=WIDTH, c_r=16, depth=1, nhead=2)
    decoder = WuerstchenDiffNeXt(
        c_in=4, c_out=4, c_r=16, patch_size=2, c_cond=16, c_hidden=[16, 16], nhead=[-1, 2], blocks=[1, 1],
        level_config=["CT", "CTA"], inject_effnet=[False, True], effnet_embd=8, clip_embd=48,
    )  # fmt: skip
    for model in (prior, decoder):
        for weight in model.parameters():
            if weight.abs().max() < 0.01:  # what they start training with at zero, or next to it
                weight.data.normal_(std=0.2)
    for last in (prior.out[1], decoder.clf[1]):
        last.weight.data.mul_(0.3)  # else divisors near 0 would make each rounding large, as in no trained model
    encoder, own_encoder = (  # of heads of 8 and 24: for heads of 12 TensorRT finds no fp16
        clip(len(words), hidden_size=width, num_hidden_layers=1, num_attention_heads=2) for width in (WIDTH, 48)
    )
    pipe = save(
        folder, diffusers.WuerstchenCombinedPipeline, tokenizer=words, text_encoder=own_encoder, decoder=decoder,
        scheduler=diffusers.DDPMWuerstchenScheduler(), vqgan=paella(), prior_prior=prior, prior_tokenizer=words,
        prior_text_encoder=encoder, prior_scheduler=diffusers.DDPMWuerstchenScheduler(),
    )  # fmt: skip
    # diffusers repeats the states of each prompt as many times as there are prompts, and fails for more than one.
    states = pipe.decoder_pipe.encode_prompt
    pipe.decoder_pipe.encode_prompt = lambda prompt, device, count, *more: states(prompt, device, 1, *more)
    return pipe
