"""Names of tensors as usual models have them, one block of each series, with their dimensions."""

from __future__ import annotations

NAMES = {
    "BERT": """
        bert.embeddings.word_embeddings.weight:2
        bert.embeddings.position_embeddings.weight:2
        bert.embeddings.token_type_embeddings.weight:2 bert.embeddings.LayerNorm.weight:1
        bert.embeddings.LayerNorm.bias:1 bert.encoder.layer.0.attention.self.query.weight:2
        bert.encoder.layer.0.attention.self.query.bias:1
        bert.encoder.layer.0.attention.self.key.weight:2
        bert.encoder.layer.0.attention.self.key.bias:1
        bert.encoder.layer.0.attention.self.value.weight:2
        bert.encoder.layer.0.attention.self.value.bias:1
        bert.encoder.layer.0.attention.output.dense.weight:2
        bert.encoder.layer.0.attention.output.dense.bias:1
        bert.encoder.layer.0.attention.output.LayerNorm.weight:1
        bert.encoder.layer.0.attention.output.LayerNorm.bias:1
        bert.encoder.layer.0.intermediate.dense.weight:2
        bert.encoder.layer.0.intermediate.dense.bias:1
        bert.encoder.layer.0.output.dense.weight:2 bert.encoder.layer.0.output.dense.bias:1
        bert.encoder.layer.0.output.LayerNorm.weight:1
        bert.encoder.layer.0.output.LayerNorm.bias:1 bert.pooler.dense.weight:2
        bert.pooler.dense.bias:1 classifier.weight:2 classifier.bias:1
    """,
    "Llama": """
        model.embed_tokens.weight:2 model.layers.0.self_attn.q_proj.weight:2
        model.layers.0.self_attn.k_proj.weight:2 model.layers.0.self_attn.v_proj.weight:2
        model.layers.0.self_attn.o_proj.weight:2 model.layers.0.mlp.gate_proj.weight:2
        model.layers.0.mlp.up_proj.weight:2 model.layers.0.mlp.down_proj.weight:2
        model.layers.0.input_layernorm.weight:1
        model.layers.0.post_attention_layernorm.weight:1 model.norm.weight:1
        lm_head.weight:2
    """,
    "GPT-2": """
        transformer.wte.weight:2 transformer.wpe.weight:2 transformer.h.0.ln_1.weight:1
        transformer.h.0.ln_1.bias:1 transformer.h.0.attn.c_attn.weight:2
        transformer.h.0.attn.c_attn.bias:1 transformer.h.0.attn.c_proj.weight:2
        transformer.h.0.attn.c_proj.bias:1 transformer.h.0.ln_2.weight:1
        transformer.h.0.ln_2.bias:1 transformer.h.0.mlp.c_fc.weight:2
        transformer.h.0.mlp.c_fc.bias:1 transformer.h.0.mlp.c_proj.weight:2
        transformer.h.0.mlp.c_proj.bias:1 transformer.ln_f.weight:1 transformer.ln_f.bias:1
        lm_head.weight:2
    """,
    "ResNet of torchvision": """
        conv1.weight:4 bn1.weight:1 bn1.bias:1 bn1.running_mean:1 bn1.running_var:1
        bn1.num_batches_tracked:0 layer1.0.conv1.weight:4 layer1.0.bn1.weight:1
        layer1.0.bn1.bias:1 layer1.0.bn1.running_mean:1 layer1.0.bn1.running_var:1
        layer1.0.bn1.num_batches_tracked:0 layer1.0.conv2.weight:4 layer1.0.bn2.weight:1
        layer1.0.bn2.bias:1 layer1.0.bn2.running_mean:1 layer1.0.bn2.running_var:1
        layer1.0.bn2.num_batches_tracked:0 fc.weight:2 fc.bias:1
    """,
    "ResNet of transformers": """
        resnet.embedder.embedder.convolution.weight:4
        resnet.embedder.embedder.normalization.weight:1
        resnet.embedder.embedder.normalization.bias:1
        resnet.embedder.embedder.normalization.running_mean:1
        resnet.embedder.embedder.normalization.running_var:1
        resnet.embedder.embedder.normalization.num_batches_tracked:0
        resnet.encoder.stages.0.layers.0.shortcut.convolution.weight:4
        resnet.encoder.stages.0.layers.0.shortcut.normalization.weight:1
        resnet.encoder.stages.0.layers.0.shortcut.normalization.bias:1
        resnet.encoder.stages.0.layers.0.shortcut.normalization.running_mean:1
        resnet.encoder.stages.0.layers.0.shortcut.normalization.running_var:1
        resnet.encoder.stages.0.layers.0.shortcut.normalization.num_batches_tracked:0
        resnet.encoder.stages.0.layers.0.layer.0.convolution.weight:4
        resnet.encoder.stages.0.layers.0.layer.0.normalization.weight:1
        resnet.encoder.stages.0.layers.0.layer.0.normalization.bias:1
        resnet.encoder.stages.0.layers.0.layer.0.normalization.running_mean:1
        resnet.encoder.stages.0.layers.0.layer.0.normalization.running_var:1
        resnet.encoder.stages.0.layers.0.layer.0.normalization.num_batches_tracked:0
        resnet.encoder.stages.0.layers.0.layer.1.convolution.weight:4
        resnet.encoder.stages.0.layers.0.layer.1.normalization.weight:1
        resnet.encoder.stages.0.layers.0.layer.1.normalization.bias:1
        resnet.encoder.stages.0.layers.0.layer.1.normalization.running_mean:1
        resnet.encoder.stages.0.layers.0.layer.1.normalization.running_var:1
        resnet.encoder.stages.0.layers.0.layer.1.normalization.num_batches_tracked:0
        classifier.1.weight:2 classifier.1.bias:1
    """,
    "ViT of timm": """
        cls_token:3 pos_embed:3 patch_embed.proj.weight:4 patch_embed.proj.bias:1
        blocks.0.norm1.weight:1 blocks.0.norm1.bias:1 blocks.0.attn.qkv.weight:2
        blocks.0.attn.qkv.bias:1 blocks.0.attn.proj.weight:2 blocks.0.attn.proj.bias:1
        blocks.0.norm2.weight:1 blocks.0.norm2.bias:1 blocks.0.mlp.fc1.weight:2
        blocks.0.mlp.fc1.bias:1 blocks.0.mlp.fc2.weight:2 blocks.0.mlp.fc2.bias:1
        norm.weight:1 norm.bias:1 head.weight:2 head.bias:1
    """,
    "ViT of torchvision": """
        class_token:3 conv_proj.weight:4 conv_proj.bias:1 encoder.pos_embedding:3
        encoder.layers.encoder_layer_0.ln_1.weight:1
        encoder.layers.encoder_layer_0.ln_1.bias:1
        encoder.layers.encoder_layer_0.self_attention.in_proj_weight:2
        encoder.layers.encoder_layer_0.self_attention.in_proj_bias:1
        encoder.layers.encoder_layer_0.self_attention.out_proj.weight:2
        encoder.layers.encoder_layer_0.self_attention.out_proj.bias:1
        encoder.layers.encoder_layer_0.ln_2.weight:1
        encoder.layers.encoder_layer_0.ln_2.bias:1
        encoder.layers.encoder_layer_0.mlp.0.weight:2
        encoder.layers.encoder_layer_0.mlp.0.bias:1
        encoder.layers.encoder_layer_0.mlp.3.weight:2
        encoder.layers.encoder_layer_0.mlp.3.bias:1 encoder.ln.weight:1 encoder.ln.bias:1
        heads.head.weight:2 heads.head.bias:1
    """,
    "ViT of transformers": """
        vit.embeddings.cls_token:3 vit.embeddings.position_embeddings:3
        vit.embeddings.patch_embeddings.projection.weight:4
        vit.embeddings.patch_embeddings.projection.bias:1
        vit.layers.0.attention.q_proj.weight:2 vit.layers.0.attention.q_proj.bias:1
        vit.layers.0.attention.k_proj.weight:2 vit.layers.0.attention.k_proj.bias:1
        vit.layers.0.attention.v_proj.weight:2 vit.layers.0.attention.v_proj.bias:1
        vit.layers.0.attention.o_proj.weight:2 vit.layers.0.attention.o_proj.bias:1
        vit.layers.0.layernorm_before.weight:1 vit.layers.0.layernorm_before.bias:1
        vit.layers.0.layernorm_after.weight:1 vit.layers.0.layernorm_after.bias:1
        vit.layers.0.mlp.fc1.weight:2 vit.layers.0.mlp.fc1.bias:1
        vit.layers.0.mlp.fc2.weight:2 vit.layers.0.mlp.fc2.bias:1 vit.layernorm.weight:1
        vit.layernorm.bias:1 classifier.weight:2 classifier.bias:1
    """,
    "ConvNeXt of timm": """
        stem.0.weight:4 stem.0.bias:1 stem.1.weight:1 stem.1.bias:1
        stages.0.blocks.0.gamma:1 stages.0.blocks.0.conv_dw.weight:4
        stages.0.blocks.0.conv_dw.bias:1 stages.0.blocks.0.norm.weight:1
        stages.0.blocks.0.norm.bias:1 stages.0.blocks.0.mlp.fc1.weight:4
        stages.0.blocks.0.mlp.fc1.bias:1 stages.0.blocks.0.mlp.fc2.weight:4
        stages.0.blocks.0.mlp.fc2.bias:1 head.norm.weight:1 head.norm.bias:1
        head.fc.weight:2 head.fc.bias:1
    """,
}


def named(family: str) -> dict[str, int]:
    """Return the names of a family with their dimensions."""
    pairs = (word.rpartition(":") for word in NAMES[family].split())
    return {name: int(count) for name, _, count in pairs}
