"""Bugs in the Triton kernels that show beyond a block, or with a program's second task."""

from .bug import Bug


def at(*cases: str, dtype: str = "float32") -> tuple[str, ...]:
    """The tests of `tests/test_triton_boundaries.py` that must fail."""
    return tuple(f"tests/test_triton_boundaries.py::test_beyond_a_block[{case}-{dtype}]" for case in cases)


def sums(length: int) -> tuple[str, ...]:
    return (f"tests/test_triton_boundaries.py::test_sums_of_many_rows[{length}]",)


BUGS = [
    # ---- sums over rows
    Bug(
        "sum-ends-with-the-first-block-of-rows",
        "kernels/triton/_sums.py",
        "tl.minimum(part * ROWS + ROWS, length), BLOCK_R)",
        "tl.minimum(part * ROWS + BLOCK_R, length), BLOCK_R)",
        sums(17),
    ),
    Bug(
        "second-part-of-a-sum-begins-at-row-0",
        "kernels/triton/_sums.py",
        "for start in range(part * ROWS, tl.minimum",
        "for start in range(0, tl.minimum",
        sums(273),
    ),
    # ---- class prototypes
    Bug(
        "members-of-the-last-chunk-alone-are-counted",
        "kernels/triton/class_prototypes.py",
        "count += tl.sum(member.to(ACC), 0)",
        "count = tl.sum(member.to(ACC), 0)",
        at("class_prototypes"),
    ),
    Bug(
        "gradient-divides-by-the-members-of-one-chunk",
        "kernels/triton/class_prototypes.py",
        "count += tl.sum((label[:, None] == other_label",
        "count = tl.sum((label[:, None] == other_label",
        at("class_prototypes"),
    ),
    Bug(
        "classes-from-17-on-are-not-written",
        "kernels/triton/class_prototypes.py",
        "n = (program // d_blocks % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)",
        "n = tl.arange(0, BLOCK_N)",
        at("class_prototypes"),
    ),
    # ---- distances
    Bug(
        "distance-of-the-last-chunk-of-columns-alone",
        "kernels/triton/_distance.py",
        "total += tl.sum(difference * difference, 0)",
        "total = tl.sum(difference * difference, 0)",
        at("pairwise_distance-sqeuclidean", "pairwise_distance-euclidean", "prototypical_loss-sqeuclidean"),
    ),
    Bug(
        "last-chunk-of-columns-runs-into-the-next-row",
        "kernels/triton/_distance.py",
        "mask=(row < rows)[None, :] & (d < D)[:, None], other=0)",
        "mask=((row < rows) & (row * D + start + BLOCK_D <= rows * D))[None, :], other=0)",
        at("pairwise_distance-manhattan", "pairwise_distance-dot"),
    ),
    Bug(
        "second-block-of-queries-at-0",
        "kernels/triton/pairwise_distance.py",
        "    task = program // n_blocks // q_blocks\n    distance = distance_tile(",
        "    q = q % BLOCK_Q\n    task = program // n_blocks // q_blocks\n    distance = distance_tile(",
        at("pairwise_distance-dot"),
    ),
    Bug(
        "weights-of-the-first-chunk-for-all-in-the-gradient",
        "kernels/triton/pairwise_distance.py",
        "pair = c[:, None] * column_stride",
        "pair = (c - start)[:, None] * column_stride",
        at("pairwise_distance-manhattan", "pairwise_distance-euclidean"),
    ),
    # ---- prototypical loss
    Bug(
        "softmax-not-rescaled-at-a-nearer-class",
        "kernels/triton/prototypical_loss.py",
        "total = total * tl.exp(shift - smallest) +",
        "total = total +",
        at("prototypical_loss-sqeuclidean"),
    ),
    Bug(
        "second-program-of-a-task-begins-one-block-on",
        "kernels/triton/prototypical_loss.py",
        "q = (part * blocks_per_part + block) * BLOCK_Q",
        "q = (part + block) * BLOCK_Q",
        at("prototypical_loss-blocks"),
    ),
    Bug(
        "tasks-beyond-the-scratch-get-the-first-tasks-gradient",
        "kernels/triton/prototypical_loss.py",
        "            grad_loss[part],\n",
        "            grad_loss,\n",
        at("prototypical_loss-scratch", dtype="float64"),
    ),
    # ---- contrastive loss
    Bug(
        "partner-outside-the-last-block-forgotten",
        "kernels/triton/contrastive_loss.py",
        "of_partner += tl.sum(",
        "of_partner = tl.sum(",
        at("contrastive_loss"),
    ),
    Bug(
        "gradient-of-columns-from-129-on-not-written",
        "kernels/triton/contrastive_loss.py",
        "e = (rest % e_blocks) * BLOCK_E + tl.arange(0, BLOCK_E)",
        "e = tl.arange(0, BLOCK_E)",
        at("contrastive_loss"),
    ),
    # ---- functional MLP
    Bug(
        "second-block-of-rows-of-a-narrow-net-at-0",
        "kernels/triton/functional_mlp.py",
        "b = (program % b_blocks) * BLOCK_B + tl.arange(0, BLOCK_B)",
        "b = tl.arange(0, BLOCK_B)",
        at("functional_mlp-net", "functional_mlp-wide-net"),
    ),
    Bug(
        "second-chunk-of-inputs-at-0",
        "kernels/triton/_layers.py",
        "i = start + tl.arange(0, HOW.BLOCK_I)",
        "i = tl.arange(0, HOW.BLOCK_I)",
        at("functional_mlp-layers"),
    ),
    Bug(
        "parts-of-a-weight-gradient-overlap",
        "kernels/triton/_layers.py",
        "end = tl.minimum(part * rows_per_part + rows_per_part, rows)",
        "end = rows",
        at("functional_mlp-shared"),
    ),
    Bug(
        "bias-of-the-first-columns-for-all",
        "kernels/triton/_layers.py",
        "tl.load(bias + task * strides.bias + o, mask=o < OUT, other=0)",
        "tl.load(bias + task * strides.bias + o % HOW.BLOCK_O, mask=o < OUT, other=0)",
        at("functional_mlp-layers"),
    ),
    # ---- fast weights
    Bug(
        "elements-from-1025-on-not-written",
        "kernels/triton/fast_weight_update.py",
        "element = block.to(INDEX) * BLOCK + tl.arange(0, BLOCK)",
        "element = tl.arange(0, BLOCK).to(INDEX)",
        at("fast_weight_update-float"),
    ),
    Bug(
        "tensors-from-the-17th-on-not-updated",
        "kernels/triton/fast_weight_update.py",
        "for start in range(0, len(outs), MOST):",
        "for start in range(0, min(len(outs), MOST), MOST):",
        at("fast_weight_update-float"),
    ),
    Bug(
        "rate-of-a-task-from-the-last-block-alone",
        "kernels/triton/fast_weight_update.py",
        "total += a * b",
        "total = a * b",
        at("fast_weight_update-task"),
    ),
    # ---- steps of optimisers
    Bug(
        "step-of-elements-from-1025-on-not-written",
        "kernels/triton/optimizer_steps.py",
        """e = block.to(INDEX) * BLOCK + tl.arange(0, BLOCK)
            mask = e < lengths[i]
            n = columns[i]
            p = _value(operands[i * COUNT], highs[0], lows[0], e, n, mask, MODES[i][0], ACC)
            g = _value(operands[i * COUNT + 1], highs[1], lows[1], e, n, mask, MODES[i][1], ACC)
            old_mean""",
        """e = tl.arange(0, BLOCK).to(INDEX)
            mask = e < lengths[i]
            n = columns[i]
            p = _value(operands[i * COUNT], highs[0], lows[0], e, n, mask, MODES[i][0], ACC)
            g = _value(operands[i * COUNT + 1], highs[1], lows[1], e, n, mask, MODES[i][1], ACC)
            old_mean""",
        at("adam_step-g"),
    ),
    Bug(
        "step-of-the-9th-tensor-left-out",
        "kernels/triton/optimizer_steps.py",
        "for start in range(0, len(params), MOST):",
        "for start in range(0, min(len(params), MOST), MOST):",
        at("sgd_step-p-"),
    ),
    # ---- inner loops
    Bug(
        "product-of-the-last-chunk-alone",
        "kernels/triton/inner_loop/products.py",
        "total = multiply_add(left, right, total, HOW.TF32)",
        "total = multiply_add(left, right, total * 0, HOW.TF32)",
        at("adapt_mlp-rows", dtype="float64"),
    ),
    Bug(
        "second-row-of-tiles-has-no-stride",
        "kernels/triton/inner_loop/products.py",
        "m[:, None] * columns + n[None, :])",
        "(m - first)[:, None] * columns + n[None, :])",
        at("adapt_mlp-rows", dtype="float64"),
    ),
    Bug(
        "state-beyond-a-block-copied-from-its-start",
        "kernels/triton/inner_loop/products.py",
        "tl.store(to + i, tl.load(source + i, mask=i < size), mask=i < size)",
        "tl.store(to + i, tl.load(source + i - start, mask=i < size), mask=i < size)",
        at("adapt_mlp-state", dtype="float64"),
    ),
    Bug(
        "second-task-of-a-program-takes-the-place-of-the-first",
        "kernels/triton/inner_loop/products.py",
        "total = tl.load(to + i, mask=i < size) + tl.load(source + i, mask=i < size)",
        "total = tl.load(source + i, mask=i < size)",
        at("adapt_mlp-rows", dtype="float64"),
    ),
    Bug(
        "second-task-begins-with-the-moments-of-the-first",
        "kernels/triton/inner_loop/steps.py",
        "mask=tile.mask & (is_first == 0)",
        "mask=tile.mask",
        ("tests/ops/test_adapt_mlp.py::test_any_number_of_programs[adapt_mlp-dense-1]",),
    ),
    Bug(
        "partition-of-the-last-tile-of-classes-alone",
        "kernels/triton/inner_loop/losses.py",
        "total += tl.sum(tl.exp(z - most[:, None]), 1)",
        "total = tl.sum(tl.exp(z - most[:, None]), 1)",
        at("meta_loss_mlp-cross_entropy", dtype="float64"),
    ),
    Bug(
        "curvature-takes-the-mean-of-the-last-tile",
        "kernels/triton/inner_loop/losses.py",
        "mean += tl.sum(p * tl.load(dot + at, mask=mask, other=0), 1)",
        "mean = tl.sum(p * tl.load(dot + at, mask=mask, other=0), 1)",
        at("meta_loss_mlp-cross_entropy", dtype="float64"),
    ),
    Bug(
        "loss-of-the-last-tile-of-outputs-alone",
        "kernels/triton/inner_loop/losses.py",
        "total += v / C * tl.sum(tl.where(mask, value, 0.0), 1)",
        "total = v / C * tl.sum(tl.where(mask, value, 0.0), 1)",
        at("meta_loss_mlp-binary_cross_entropy", dtype="float64"),
    ),
    Bug(
        "rate-of-a-layer-from-its-last-block-alone",
        "kernels/triton/inner_loop/direction.py",
        "total += product",
        "total = product",
        at("adapt_mlp-state", dtype="float64"),
    ),
    Bug(
        "direction-ends-with-a-layers-first-block",
        "kernels/triton/inner_loop/direction.py",
        "for start in range(begin, end, HOW.BLOCK_P):",
        "for start in range(begin, begin + 1, HOW.BLOCK_P):",
        at("adapt_mlp-state", dtype="float64"),
    ),
    Bug(
        "second-tile-of-delta-tangents-lacks-a-term",
        "kernels/triton/inner_loop/tangents.py",
        "                total = add_product(total, above, out, d, columns, tile, out, HOW)",
        "                if start == 0:\n"
        "                    total = add_product(total, above, out, d, columns, tile, out, HOW)",
        at("adapt_mlp-rows", dtype="float64"),
    ),
    Bug(
        "last-tile-of-the-hessian-product-skipped",
        "kernels/triton/inner_loop/tangents.py",
        "for start in range(0, columns, HOW.BLOCK_W):",
        "for start in range(0, tl.minimum(columns, HOW.BLOCK_W), HOW.BLOCK_W):",
        at("adapt_mlp-rows", dtype="float64"),
    ),
    Bug(
        "second-task-adds-to-the-first-tasks-query-gradient",
        "kernels/triton/inner_loop/query.py",
        "d_base = d_query.base + task * (sizes.queries * sizes.first)",
        "d_base = d_query.base + task * 0",
        at("meta_loss_mlp-gram", dtype="float64"),
    ),
    Bug(
        "gradient-of-all-rates-to-the-first-step",
        "kernels/triton/inner_loop/sweep.py",
        "gradients.rates.layers + k * sizes.layers",
        "gradients.rates.layers + k * 0",
        at("adapt_mlp-rows", dtype="float64"),
    ),
    # ---- convolutions
    Bug(
        "every-block-of-columns-at-the-first-tap",
        "kernels/triton/conv/gather.py",
        "tl.zeros([BLOCK], tl.int32) + start // inputs",
        "tl.zeros([BLOCK], tl.int32)",
        at("task_conv2d-one-tap"),
    ),
    Bug(
        "second-block-of-pixels-at-0",
        "kernels/triton/task_conv2d.py",
        "pixel = (program // o_blocks % p_blocks).to(tl.int32) * HOW.BLOCK_P + tl.arange(0, HOW.BLOCK_P)",
        "pixel = tl.arange(0, HOW.BLOCK_P)",
        at("task_conv2d"),
    ),
    Bug(
        "weights-of-the-first-columns-for-all",
        "kernels/triton/task_conv2d.py",
        "weight + k.to(tl.int64)[:, None] * row",
        "weight + (k - start).to(tl.int64)[:, None] * row",
        at("task_conv2d", "task_conv2d-one-tap"),
    ),
    Bug(
        "bias-of-a-convolutions-first-outputs-for-all",
        "kernels/triton/task_conv2d.py",
        "group * sizes.outputs + o, mask=o < sizes.outputs",
        "group * sizes.outputs + o % HOW.BLOCK_O, mask=o < sizes.outputs",
        at("task_conv2d"),
    ),
    Bug(
        "parts-of-a-convolutions-weight-gradient-overlap",
        "kernels/triton/task_conv2d.py",
        "end = tl.minimum(part * pixels_per_part + pixels_per_part, sizes.pixels)",
        "end = sizes.pixels",
        at("task_conv2d-parts"),
    ),
    Bug(
        "weight-gradient-of-the-last-pixels-alone",
        "kernels/triton/task_conv2d.py",
        "total = multiply_add(g.to(HOW.OPERAND), h.to(HOW.OPERAND), total, HOW.TF32)",
        "total = multiply_add(g.to(HOW.OPERAND), h.to(HOW.OPERAND), total * 0, HOW.TF32)",
        at("task_conv2d", "task_conv2d-parts"),
    ),
    # ---- moments
    Bug(
        "lanes-beyond-the-last-pixel-count",
        "kernels/triton/_norm_moments.py",
        "count += (pixel < end)[:, None].to(ACC)",
        "count += (pixel >= 0)[:, None].to(ACC)",
        at("norm_moments-batch"),
    ),
    Bug(
        "means-of-parts-taken-for-equal",
        "kernels/triton/_norm_moments.py",
        " + weight.to(ACC)[:, None] * from_mean * from_mean",
        "",
        at("norm_moments-batch", "norm_moments-group"),
    ),
    Bug(
        "second-block-of-a-groups-channels-is-the-first",
        "kernels/triton/_norm_moments.py",
        "at * per_group + (entry % per_group)[:, None]",
        "at * per_group + (entry % per_group % BLOCK_E)[:, None]",
        at("norm_moments-group"),
    ),
    # ---- norm, activation, pool
    Bug(
        "second-block-of-windows-at-0",
        "kernels/triton/conv/windows.py",
        "window = (program // c_blocks % w_blocks).to(tl.int32) * HOW.BLOCK_P + tl.arange(0, HOW.BLOCK_P)",
        "window = tl.arange(0, HOW.BLOCK_P)",
        at("norm_act_pool"),
    ),
    Bug(
        "means-of-the-first-channels-for-all",
        "kernels/triton/conv/windows.py",
        "at = row * (sizes.channels // sizes.per_group) + channels.c // sizes.per_group",
        "at = row * (sizes.channels // sizes.per_group) + channels.c % HOW.BLOCK_C // sizes.per_group",
        at("norm_act_pool", "norm_act_pool_bwd-batch"),
    ),
    Bug(
        "sums-of-the-last-windows-alone",
        "kernels/triton/_channel_sums.py",
        "gn_sum += tl.sum(",
        "gn_sum = tl.sum(",
        at("norm_act_pool", "norm_act_pool_bwd-batch"),
    ),
    Bug(
        "windows-of-the-first-part-in-all",
        "kernels/triton/_channel_sums.py",
        "for start in range(part * windows_per_part, end",
        "for start in range(0, end",
        at("norm_act_pool", "norm_act_pool_bwd-batch"),
    ),
    Bug(
        "bend-of-the-last-windows-alone",
        "kernels/triton/_norm_second.py",
        "e_sum += tl.sum(e, 0)",
        "e_sum = tl.sum(e, 0)",
        at("norm_act_pool_bwd-bent"),
    ),
    Bug(
        "spread-forgotten-in-the-second-derivative",
        "kernels/triton/_norm_second.py",
        " + channels.rate * spread * seen.n",
        "",
        at("norm_act_pool_bwd-batch", "norm_act_pool_bwd-bent"),
    ),
]
