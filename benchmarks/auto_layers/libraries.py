"""Architectures of torchvision, timm, transformers and PEFT, small and with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.auto_layers.parts import Entry, on, total

Build = Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]
_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def torchvision_entries() -> list[Entry]:
    def of(name: str, size: int = 64, **options: Any) -> Build:
        def build() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
            import torchvision

            return torchvision.models.get_model(name, weights=None, **options), on((2, 3, size, size))

        return build

    return [
        Entry("resnet18", of("resnet18"), 8, "layer1.0", "layer4.1"),
        Entry("resnet50", of("resnet50"), 16, "layer1.0", "layer4.2"),
        Entry("vgg11_bn", of("vgg11_bn"), 19, "features.0", "classifier.6"),
        Entry("alexnet", of("alexnet"), 8, "features.0", "classifier.6"),
        Entry("mobilenet_v2", of("mobilenet_v2"), 19, "features.0", "features.18"),
        Entry("mobilenet_v3_small", of("mobilenet_v3_small"), 13, "features.0", "features.12"),
        Entry("efficientnet_b0", of("efficientnet_b0"), 16, "features.1.0", "features.7.0"),
        Entry("convnext_tiny", of("convnext_tiny"), 18, "features.1.0", "features.7.2"),
        Entry(
            "vit_b_32",
            of("vit_b_32", 32, image_size=32),
            12,
            "encoder.layers.encoder_layer_0",
            "encoder.layers.encoder_layer_11",
        ),
        Entry("swin_t", of("swin_t"), 12, "features.1.0", "features.7.1"),
        Entry(
            "regnet_y_400mf", of("regnet_y_400mf"), 16, "trunk_output.block1.block1-0", "trunk_output.block4.block4-5"
        ),
        Entry(
            "densenet121",
            of("densenet121"),
            8,
            "features.conv0",
            "features.denseblock4",
            "right: dense layers inside of a block are only parts of its output",
        ),
        Entry("squeezenet1_1", of("squeezenet1_1"), 9, "features.0", "features.12"),
        Entry("shufflenet_v2_x0_5", of("shufflenet_v2_x0_5"), 16, "stage2.0", "stage4.3"),
        Entry("googlenet", of("googlenet", init_weights=False, aux_logits=False), 9, "inception3a", "inception5b"),
        Entry("inception_v3", of("inception_v3", 75, init_weights=False, aux_logits=False), 11, "Mixed_5b", "Mixed_7c"),
        Entry("mnasnet0_5", of("mnasnet0_5"), 16, "layers.8.0", "layers.13.0"),
    ]


def timm_entries() -> list[Entry]:
    def of(name: str, size: int = 64, **options: Any) -> Build:
        def build() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
            import timm

            return timm.create_model(name, pretrained=False, num_classes=4, **options), on((2, 3, size, size))

        return build

    return [
        Entry("resnet26", of("resnet26"), 8, "layer1.0", "layer4.1"),
        Entry("vit_tiny_patch16_224", of("vit_tiny_patch16_224", img_size=64), 12, "blocks.0", "blocks.11"),
        Entry(
            "swin_tiny_patch4_window7_224",
            of("swin_tiny_patch4_window7_224", img_size=64, window_size=2),
            12,
            "layers.0.blocks.0",
            "layers.3.blocks.1",
        ),
        Entry("convnext_atto", of("convnext_atto"), 12, "stages.0.blocks.0", "stages.3.blocks.1"),
        Entry("efficientnet_b0", of("efficientnet_b0"), 16, "blocks.0.0", "blocks.6.0"),
        Entry("mixer_s32_224", of("mixer_s32_224", img_size=64), 8, "blocks.0", "blocks.7"),
        Entry(
            "densenet121",
            of("densenet121"),
            8,
            "features.conv0",
            "features.denseblock4",
            "right: dense layers inside of a block are only parts of its output",
        ),
        Entry("regnetx_002", of("regnetx_002"), 13, "s1.b1", "s4.b7"),
        Entry(
            "maxvit_rmlp_pico_rw_256",
            of("maxvit_rmlp_pico_rw_256", img_size=64),
            11,
            "stages.0.blocks.0",
            "stages.3.blocks.1",
        ),
        Entry("deit3_small_patch16_224", of("deit3_small_patch16_224", img_size=64), 12, "blocks.0", "blocks.11"),
        Entry("nfnet_l0", of("nfnet_l0"), 12, "stages.0.0", "stages.3.2"),
        Entry("poolformer_s12", of("poolformer_s12"), 12, "stages.0.blocks.0", "stages.3.blocks.1"),
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
    bart: dict[str, Any] = {
        "vocab_size": 64,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    }
    tower: dict[str, Any] = {k: v for k, v in _SMALL.items() if k != "vocab_size"}
    text = {**_SMALL, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    stages: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16, 16], "depths": [2, 2, 1]}

    def peft() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        import peft

        model, call = of("GPT2LMHeadModel", ids, "GPT2Config", **gpt2)()
        config = peft.LoraConfig(target_modules=["c_attn", "c_fc"], r=2, fan_in_fan_out=True)
        return peft.get_peft_model(model, config), call

    def mixtral() -> Build:
        return of("MixtralForCausalLM", ids, "MixtralConfig", **_SMALL, num_key_value_heads=2, num_local_experts=4)

    return [
        Entry(
            "GPT2LMHeadModel", of("GPT2LMHeadModel", ids, "GPT2Config", **gpt2), 2, "transformer.h.0", "transformer.h.1"
        ),
        Entry("LlamaForCausalLM", of("LlamaForCausalLM", ids, **_SMALL), 2, "model.layers.0", "model.layers.1"),
        Entry("MixtralForCausalLM", mixtral(), 2, "model.layers.0", "model.layers.1"),
        Entry("BertModel", of("BertModel", encoder_ids, **_SMALL), 2, "encoder.layer.0", "encoder.layer.1"),
        Entry(
            "AlbertModel",
            of("AlbertModel", encoder_ids, **_SMALL, embedding_size=16),
            1,
            "encoder.albert_layer_groups.0.albert_layers.0",
            "encoder.albert_layer_groups.0.albert_layers.0",
            "right: one layer that runs several times",
        ),
        Entry(
            "DistilBertModel",
            of("DistilBertModel", encoder_ids, vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=64),
            2,
            "transformer.layer.0",
            "transformer.layer.1",
        ),
        Entry("DebertaV2Model", of("DebertaV2Model", encoder_ids, **_SMALL), 2, "encoder.layer.0", "encoder.layer.1"),
        Entry(
            "T5ForConditionalGeneration",
            of(
                "T5ForConditionalGeneration",
                both,
                "T5Config",
                vocab_size=64,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
            ),
            4,
            "encoder.block.0",
            "decoder.block.1",
        ),
        Entry("BartModel", of("BartModel", both, **bart), 4, "encoder.layers.0", "decoder.layers.1"),
        Entry("ViTModel", of("ViTModel", pixels(32), **tower, image_size=32, patch_size=8), 2, "layers.0", "layers.1"),
        Entry(
            "SwinModel",
            of(
                "SwinModel",
                pixels(32),
                image_size=32,
                patch_size=4,
                embed_dim=16,
                depths=[2, 2],
                num_heads=[2, 2],
                window_size=2,
            ),
            4,
            "encoder.layers.0.blocks.0",
            "encoder.layers.1.blocks.1",
        ),
        Entry(
            "ResNetModel",
            of("ResNetModel", pixels(64), **stages),
            5,
            "encoder.stages.0.layers.0",
            "encoder.stages.2.layers.0",
        ),
        Entry(
            "ConvNextModel",
            of("ConvNextModel", pixels(64), hidden_sizes=[8, 16, 16, 16], depths=[2, 2, 1, 1]),
            6,
            "encoder.stages.0.layers.0",
            "encoder.stages.3.layers.0",
        ),
        Entry(
            "SegformerModel",
            of(
                "SegformerModel",
                pixels(64),
                hidden_sizes=[8, 16],
                depths=[2, 1],
                num_encoder_blocks=2,
                num_attention_heads=[1, 2],
                sr_ratios=[2, 1],
                patch_sizes=[7, 3],
                strides=[4, 2],
                mlp_ratios=[2, 2],
            ),
            3,
            "stages.0.blocks.0",
            "stages.1.blocks.0",
        ),
        Entry(
            "CLIPModel",
            of(
                "CLIPModel",
                clip,
                text_config=text,
                vision_config={**tower, "image_size": 32, "patch_size": 8},
                projection_dim=16,
            ),
            4,
            "text_model.encoder.layers.0",
            "vision_model.encoder.layers.1",
        ),
        Entry(
            "WhisperModel",
            of(
                "WhisperModel",
                speech,
                **{
                    **bart,
                    "max_source_positions": 32,
                    "bos_token_id": 1,
                    "eos_token_id": 2,
                    "pad_token_id": 0,
                    "decoder_start_token_id": 1,
                },
            ),
            4,
            "encoder.layers.0",
            "decoder.layers.1",
        ),
        Entry(
            "Wav2Vec2Model",
            of(
                "Wav2Vec2Model",
                wave,
                **_SMALL,
                conv_dim=[16] * 3,
                conv_stride=[5, 2, 2],
                conv_kernel=[10, 3, 3],
                mask_time_prob=0.0,
                num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=4,
            ),
            2,
            "encoder.layers.0",
            "encoder.layers.1",
        ),
        Entry(
            "MambaModel",
            of("MambaModel", ids, vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
            2,
            "layers.0",
            "layers.1",
        ),
        Entry(
            "RwkvModel",
            of("RwkvModel", ids, vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
            2,
            "blocks.0",
            "blocks.1",
        ),
        Entry(
            "GPT2LMHeadModel with LoRA (PEFT)",
            peft,
            2,
            "base_model.model.transformer.h.0",
            "base_model.model.transformer.h.1",
        ),
    ]
