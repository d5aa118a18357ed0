"""Train the reference model: a Stable-Diffusion-shaped text-to-image model that draws emoji from their names.

    python examples/emoji/train.py            # about 90 minutes on 2 cores; resumes where it was stopped

Three stages, each seeded and checkpointed into ``--work``: an autoencoder (32x32 pixels to 8x8x4 latents); the UNet and
the CLIP text encoder together (v-prediction, 10 % empty prompts, averaged weights); the decoder once more, for sharper
pictures of the same latents. The result is a StableDiffusionPipeline folder in fp16. ``evaluate.py`` judges it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import HERE, load
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from evaluate import judge, open_checkpoint
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CONTEXT = 24  # tokens; the longest name takes 14 with its two marks
START, END = "<|startoftext|>", "<|endoftext|>"
VAE_STEPS, UNET_STEPS, DECODER_STEPS = 1500, 4100, 1500
VAE_BATCH, UNET_BATCH = 48, 64
EMPTY_PROMPTS = 0.1


def make_tokenizer(names: list[list[str]], folder: Path) -> CLIPTokenizer:
    """Train a CLIP-style byte-pair tokenizer on the names: 256 bytes, 256 bytes at a word's end, merges, two marks."""
    pieces = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    pieces.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(r"\s+", " "), normalizers.Lowercase()]
    )
    pattern = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    pieces.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), end_of_word_suffix="</w>",
        show_progress=False,
    )  # fmt: skip
    pieces.train_from_iterator([name for group in names for name in group], trainer)
    model = json.loads(pieces.to_str())["model"]
    # Every byte needs its end-of-word form too, so that a prompt of unseen letters still has tokens.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [letter + "</w>" for letter in alphabet]
    words += [token for token in sorted(model["vocab"], key=model["vocab"].get) if token not in set(words)]
    vocab = {token: index for index, token in enumerate([*words, START, END])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=CONTEXT)
    tokenizer.save_pretrained(folder)
    return tokenizer


def train_vae(pictures: torch.Tensor, work: Path) -> AutoencoderKL:
    """Pixels as they are, and a KL term just strong enough to keep latents bounded."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96), layers_per_block=1, latent_channels=4, norm_num_groups=16, sample_size=32,
    ).to(memory_format=torch.channels_last)  # fmt: skip
    optimizer = torch.optim.AdamW(vae.parameters(), 1.5e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, VAE_STEPS, pct_start=0.05, cycle_momentum=False)

    def step(number: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(number)
        batch = pictures[torch.randint(len(pictures), (VAE_BATCH,), generator=random)]
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(batch).latent_dist
            mean, std = latents.mean.float(), latents.std.float()
            noise = torch.randn(mean.shape, generator=random)
            out = vae.decode(mean + std * noise).sample.float()
        return pixel_loss(out, batch) + 1e-5 * latents.kl().mean()

    loop("vae", {"vae": vae}, optimizer, schedule, step, VAE_STEPS, work)
    return vae.eval()


def train_decoder(vae: AutoencoderKL, pictures: torch.Tensor, latents, work: Path) -> None:
    """Train the decoder alone, in place, on latents that no longer move; the denoiser's are the same."""
    mean, std = latents
    parts = {"decoder": vae.decoder.train(), "post_quant_conv": vae.post_quant_conv}
    parameters = [p for part in parts.values() for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, 8e-4, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-4, DECODER_STEPS, pct_start=0.05, cycle_momentum=False)

    def step(number: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(number)
        index = torch.randint(len(mean), (VAE_BATCH,), generator=random)
        # A denoiser's latents are never quite right: twice the posterior's noise makes the decoder forgive that.
        noise = 2 * std[index] * torch.randn(mean[index].shape, generator=random)
        with torch.autocast("cpu", torch.bfloat16):
            out = vae.decode((mean[index] + noise).contiguous(memory_format=torch.channels_last)).sample.float()
        return pixel_loss(out, pictures[index])

    average = loop("decoder", parts, optimizer, schedule, step, DECODER_STEPS, work, average=0.995)
    for name, part in parts.items():
        part.load_state_dict(average[name])
    vae.eval()


def pixel_loss(out: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """L1, MSE, and L1 of the differences of neighbouring pixels, which keeps edges sharp."""
    edges = F.l1_loss(out.diff(dim=2), real.diff(dim=2)) + F.l1_loss(out.diff(dim=3), real.diff(dim=3))
    return F.l1_loss(out, real) + F.mse_loss(out, real) + edges


def train_unet(latents: tuple[torch.Tensor, torch.Tensor], names: list[list[str]], tokenizer, work: Path):
    """Train the denoiser and the text encoder on v-prediction; return their averaged weights."""
    torch.manual_seed(1)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=384, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=CONTEXT, projection_dim=96,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 128, 160), layers_per_block=2, cross_attention_dim=96,
        attention_head_dim=4, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ).to(memory_format=torch.channels_last)  # fmt: skip
    models_ = {"unet": unet, "text": text}
    parameters = [p for model in models_.values() for p in model.parameters()]
    optimizer = torch.optim.AdamW(parameters, 8e-4, betas=(0.9, 0.99), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-4, UNET_STEPS, pct_start=0.03, cycle_momentum=False)
    alphas = make_scheduler().alphas_cumprod
    tokens = [tokenize(tokenizer, group) for group in names]
    empty = tokenize(tokenizer, [""])[0]
    mean, std = latents

    def step(number: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(number)
        index = torch.randint(len(mean), (UNET_BATCH,), generator=random)
        clean = mean[index] + std[index] * torch.randn(mean[index].shape, generator=random)
        noise = torch.randn(clean.shape, generator=random)
        timestep = torch.randint(1000, (UNET_BATCH,), generator=random)
        choice, drop = torch.rand(2, UNET_BATCH, generator=random)
        # Half of the time the emoji's first name, else any of its names.
        group = [tokens[i] for i in index]
        prompt = torch.stack(
            [g[max(0, int((2 * c - 1) * len(g)))] for g, c in zip(group, choice.tolist(), strict=True)]
        )
        prompt = torch.where((drop < EMPTY_PROMPTS)[:, None], empty, prompt)
        a = alphas[timestep].sqrt()[:, None, None, None]
        s = (1 - alphas[timestep]).sqrt()[:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            hidden = text(prompt).last_hidden_state
            out = unet((a * clean + s * noise).contiguous(memory_format=torch.channels_last), timestep, hidden).sample
        return F.mse_loss(out.float(), a * noise - s * clean)

    average = loop("unet", models_, optimizer, schedule, step, UNET_STEPS, work, average=0.998)
    for name, model in models_.items():
        model.load_state_dict(average[name])
    return unet.eval(), text.eval()


def loop(name, models_, optimizer, schedule, step, steps, work: Path, average: float = 0.0):
    """Run ``step(number)`` for ``steps`` steps, saving everything every few minutes; return the averaged weights."""
    work.mkdir(parents=True, exist_ok=True)
    file, first = work / f"{name}.pt", 0
    ema = {key: {k: v.clone() for k, v in model.state_dict().items()} for key, model in models_.items()}
    if file.exists():
        state = torch.load(file, weights_only=True)
        for key, model in models_.items():
            model.load_state_dict(state[key])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        ema, first = state["ema"], state["step"]
    losses, begin = [], time.time()
    for number in range(first, steps):
        loss = step(number)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        schedule.step()
        keep = min(average, number / (number + 10))
        with torch.no_grad():
            for key, model in models_.items():
                for k, v in model.state_dict().items():
                    ema[key][k].lerp_(v, 1 - keep) if v.is_floating_point() else ema[key][k].copy_(v)
        losses.append(loss.item())
        if (number + 1) % 50 == 0:
            pace = (time.time() - begin) / (number + 1 - first)
            print(f"{name} {number + 1}/{steps} loss {np.mean(losses[-50:]):.4f} {pace:.2f} s a step", flush=True)
        if (number + 1) % 200 == 0 or number + 1 == steps:
            state = {key: model.state_dict() for key, model in models_.items()}
            state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "ema": ema}
            torch.save(state | {"step": number + 1}, file.with_suffix(".new"))
            os.replace(file.with_suffix(".new"), file)
    return ema


def tokenize(tokenizer, texts: list[str]) -> torch.Tensor:
    return tokenizer(texts, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt").input_ids


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder for the state of the training")
    parser.add_argument("--output", type=Path, default=HERE / "model", help="where the checkpoint goes")
    options = parser.parse_args()
    os.nice(10)
    torch.set_num_threads(min(2, len(os.sched_getaffinity(0))))
    tiles, names = load()
    pictures = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 127.5 - 1
    pictures = pictures.contiguous(memory_format=torch.channels_last)
    tokenizer = make_tokenizer(names, options.work / "tokenizer")

    vae = train_vae(pictures, options.work)
    with torch.no_grad():
        codes = [vae.encode(batch).latent_dist for batch in pictures.split(64)]
        mean, std = torch.cat([c.mean for c in codes]), torch.cat([c.std for c in codes])
    scale = 1 / mean.std().item()
    vae.register_to_config(scaling_factor=scale)

    unet, text = train_unet((mean * scale, std * scale), names, tokenizer, options.work)
    train_decoder(vae, pictures, (mean, std), options.work)
    with torch.no_grad():
        error = F.mse_loss(torch.cat([vae.decode(m).sample for m in mean.split(64)]).clamp(-1, 1), pictures)
    print(f"reconstruction PSNR {10 * torch.log10(4 / error):.1f} dB")
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=make_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(torch.float16).save_pretrained(options.output)
    for file in ("vocab.json", "merges.txt"):
        (options.output / "tokenizer" / file).write_text((options.work / "tokenizer" / file).read_text())
    size = sum(file.stat().st_size for file in options.output.rglob("*") if file.is_file())
    print(f"saved {options.output}: {size / 1e6:.1f} MB")
    figures, _ = judge(open_checkpoint(options.output, steps=20, guidance=4.0), 256)
    print(f"of 256 prompts: top-1 {figures['top1']:.1%}, top-5 {figures['top5']:.1%}")


if __name__ == "__main__":
    main()
