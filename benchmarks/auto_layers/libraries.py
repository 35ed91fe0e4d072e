"""Architectures of torchvision, timm, transformers and PEFT, small and with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.auto_layers.parts import Entry, on, total

Build = Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]
_SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def torchvision_entries() -> list[Entry]:
    def of(name: str, size: int = 64, **options: Any) -> Build:
        def build() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
            import torchvision

            return torchvision.models.get_model(name, weights=None, **options), on((2, 3, size, size))

        return build

    return [
        Entry("resnet18", of("resnet18"), 0, "", ""),
        Entry("resnet50", of("resnet50"), 0, "", ""),
        Entry("vgg11_bn", of("vgg11_bn"), 0, "", ""),
        Entry("alexnet", of("alexnet"), 0, "", ""),
        Entry("mobilenet_v2", of("mobilenet_v2"), 0, "", ""),
        Entry("mobilenet_v3_small", of("mobilenet_v3_small"), 0, "", ""),
        Entry("efficientnet_b0", of("efficientnet_b0"), 0, "", ""),
        Entry("convnext_tiny", of("convnext_tiny"), 0, "", ""),
        Entry("vit_b_32", of("vit_b_32", 32, image_size=32), 0, "", ""),
        Entry("swin_t", of("swin_t"), 0, "", ""),
        Entry("regnet_y_400mf", of("regnet_y_400mf"), 0, "", ""),
        Entry("densenet121", of("densenet121"), 0, "", ""),
        Entry("squeezenet1_1", of("squeezenet1_1"), 0, "", ""),
        Entry("shufflenet_v2_x0_5", of("shufflenet_v2_x0_5"), 0, "", ""),
        Entry("googlenet", of("googlenet", init_weights=False, aux_logits=False), 0, "", ""),
        Entry("inception_v3", of("inception_v3", 75, init_weights=False, aux_logits=False), 0, "", ""),
        Entry("mnasnet0_5", of("mnasnet0_5"), 0, "", ""),
    ]


def timm_entries() -> list[Entry]:
    def of(name: str, size: int = 64, **options: Any) -> Build:
        def build() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
            import timm

            return timm.create_model(name, pretrained=False, num_classes=4, **options), on((2, 3, size, size))

        return build

    return [
        Entry("resnet26", of("resnet26"), 0, "", ""),
        Entry("vit_tiny_patch16_224", of("vit_tiny_patch16_224", img_size=64), 0, "", ""),
        Entry("swin_tiny_patch4_window7_224", of("swin_tiny_patch4_window7_224", img_size=64, window_size=2), 0, "", ""),
        Entry("convnext_atto", of("convnext_atto"), 0, "", ""),
        Entry("efficientnet_b0", of("efficientnet_b0"), 0, "", ""),
        Entry("mixer_s32_224", of("mixer_s32_224", img_size=64), 0, "", ""),
        Entry("densenet121", of("densenet121"), 0, "", ""),
        Entry("regnetx_002", of("regnetx_002"), 0, "", ""),
        Entry("maxvit_rmlp_pico_rw_256", of("maxvit_rmlp_pico_rw_256", img_size=64), 0, "", ""),
        Entry("deit3_small_patch16_224", of("deit3_small_patch16_224", img_size=64), 0, "", ""),
        Entry("nfnet_l0", of("nfnet_l0"), 0, "", ""),
        Entry("poolformer_s12", of("poolformer_s12"), 0, "", ""),
    ]


def transformers_entries() -> list[Entry]:
    def of(kind: str, call: Callable[[nn.Module], Tensor], config: str | None = None, **options: Any) -> Build:
        def build() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
            import transformers

            config_class = getattr(transformers, config or kind.split("For")[0].removesuffix("Model") + "Config")
            if config is None and not hasattr(config_class, "model_type"):
                raise TypeError(f"{kind} has no configuration")
            return getattr(transformers, kind)(config_class(**options)), call

        return build

    def ids(model: nn.Module) -> Tensor:
        return total(model(input_ids=torch.randint(1, 60, (2, 8)), use_cache=False)[0])

    def encoder_ids(model: nn.Module) -> Tensor:
        return total(model(input_ids=torch.randint(1, 60, (2, 8)))[0])

    def both(model: nn.Module) -> Tensor:
        tokens = torch.randint(1, 60, (2, 8))
        return total(model(input_ids=tokens, decoder_input_ids=tokens, use_cache=False)[0])

    def pixels(size: int) -> Callable[[nn.Module], Tensor]:
        return lambda model: total(model(pixel_values=torch.randn(2, 3, size, size))[0])

    def clip(model: nn.Module) -> Tensor:
        pixel, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 60, (2, 8))
        return total(model(input_ids=tokens, pixel_values=pixel).logits_per_image)

    def speech(model: nn.Module) -> Tensor:
        features, tokens = torch.randn(2, 80, 64), torch.randint(1, 60, (2, 4))
        return total(model(input_features=features, decoder_input_ids=tokens, use_cache=False)[0])

    def wave(model: nn.Module) -> Tensor:
        return total(model(torch.randn(2, 2000))[0])

    gpt2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    bart = {
        "vocab_size": 64,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    }
    tower = {k: v for k, v in _SMALL.items() if k != "vocab_size"}
    text = {**_SMALL, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    stages = {"embedding_size": 8, "hidden_sizes": [8, 16, 16], "depths": [2, 2, 1]}

    def peft() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        import peft

        model, call = of("GPT2LMHeadModel", ids, "GPT2Config", **gpt2)()
        config = peft.LoraConfig(target_modules=["c_attn", "c_fc"], r=2, fan_in_fan_out=True)
        return peft.get_peft_model(model, config), call  # type: ignore[arg-type]

    def mixtral() -> Build:
        return of(
            "MixtralForCausalLM", ids, "MixtralConfig", **_SMALL, num_key_value_heads=2, num_local_experts=4
        )

    return [
        Entry("GPT2LMHeadModel", of("GPT2LMHeadModel", ids, "GPT2Config", **gpt2), 0, "", ""),
        Entry("LlamaForCausalLM", of("LlamaForCausalLM", ids, **_SMALL), 0, "", ""),
        Entry("MixtralForCausalLM", mixtral(), 0, "", ""),
        Entry("BertModel", of("BertModel", encoder_ids, **_SMALL), 0, "", ""),
        Entry("AlbertModel", of("AlbertModel", encoder_ids, **_SMALL, embedding_size=16), 0, "", ""),
        Entry("DistilBertModel", of("DistilBertModel", encoder_ids, vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=64), 0, "", ""),
        Entry("DebertaV2Model", of("DebertaV2Model", encoder_ids, **_SMALL), 0, "", ""),
        Entry("T5ForConditionalGeneration", of("T5ForConditionalGeneration", both, "T5Config", vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4), 0, "", ""),
        Entry("BartModel", of("BartModel", both, **bart), 0, "", ""),
        Entry("ViTModel", of("ViTModel", pixels(32), **tower, image_size=32, patch_size=8), 0, "", ""),
        Entry("SwinModel", of("SwinModel", pixels(32), image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=2), 0, "", ""),
        Entry("ResNetModel", of("ResNetModel", pixels(64), **stages), 0, "", ""),
        Entry("ConvNextModel", of("ConvNextModel", pixels(64), hidden_sizes=[8, 16, 16, 16], depths=[2, 2, 1, 1]), 0, "", ""),
        Entry("SegformerModel", of("SegformerModel", pixels(64), hidden_sizes=[8, 16], depths=[2, 1], num_encoder_blocks=2, num_attention_heads=[1, 2], sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2]), 0, "", ""),
        Entry("CLIPModel", of("CLIPModel", clip, text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=16), 0, "", ""),
        Entry("WhisperModel", of("WhisperModel", speech, **{**bart, "max_source_positions": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}), 0, "", ""),
        Entry("Wav2Vec2Model", of("Wav2Vec2Model", wave, **_SMALL, conv_dim=[16] * 3, conv_stride=[5, 2, 2], conv_kernel=[10, 3, 3], mask_time_prob=0.0, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4), 0, "", ""),
        Entry("MambaModel", of("MambaModel", ids, vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4), 0, "", ""),
        Entry("RwkvModel", of("RwkvModel", ids, vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32), 0, "", ""),
        Entry("GPT2LMHeadModel with LoRA (PEFT)", peft, 0, "", ""),
    ]
