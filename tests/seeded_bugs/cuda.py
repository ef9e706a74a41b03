"""Bugs in the CUDA kernels, most of them beyond an internal boundary: the files of `tests/cuda_host` list those."""

from .bug import Bug

KERNELS, LOOPS = "tests/cuda_host/test_kernels_on_host.py::", "tests/cuda_host/test_inner_loops_on_host.py::"
CONV = "tests/cuda_host/test_conv_on_host.py::"


def case(name: str) -> tuple[str, ...]:
    """Of the inner loops."""
    return (f"{LOOPS}test_cases[{name}]",)


def conv(name: str) -> tuple[str, ...]:
    return (f"{CONV}test_task_conv2d[{name}-float64]",)


def norm(name: str, what: str = "norm_act_pool") -> tuple[str, ...]:
    return (f"{CONV}test_{what}[{name}-float64]",)


BUGS = [
    # ---- class_prototypes
    Bug(
        "prototypes-second-labels-are-the-first",
        "csrc/cuda/class_prototypes.cu",
        "p.labels[t * p.support + first + threadIdx.x]",
        "p.labels[t * p.support + threadIdx.x]",
        (f"{KERNELS}test_class_prototypes[4x257x17x65-float64]",),
    ),
    Bug(
        "prototypes-of-a-feature-too-many",
        "csrc/cuda/class_prototypes.cu",
        "if (label < p.classes && column < p.width)",
        "if (label < p.classes && column <= p.width)",
        (f"{KERNELS}test_class_prototypes[4x257x17x65-float64]",),
    ),
    Bug(
        "prototypes-gradient-counts-32-rows",
        "csrc/cuda/class_prototypes.cu",
        "for (int64_t i = lane; i < p.support; i += kColumns)",
        "for (int64_t i = lane; i < smaller<int64_t>(p.support, kColumns); i += kColumns)",
        (f"{KERNELS}test_class_prototypes[4x257x17x65-float64]",),
    ),
    # ---- distances and their gradients
    Bug(
        "distances-second-features-are-the-first",
        "csrc/cuda/distance_tile.h",
        "load(from + r * width + first + k)",
        "load(from + r * width + k)",
        (f"{KERNELS}test_pairwise_distance[4x129x17x33-0-float64]",),
    ),
    Bug(
        "distances-second-prototypes-are-the-first",
        "csrc/cuda/pairwise_distance.cu",
        "static_cast<const T*>(p.prototypes) + (t * p.classes + label) * p.width",
        "static_cast<const T*>(p.prototypes) + t * p.classes * p.width",
        (f"{KERNELS}test_pairwise_distance[2x5x129x3-3-float64]",),
    ),
    Bug(
        "distances-to-a-class-too-many",
        "csrc/cuda/pairwise_distance.cu",
        "if (q < p.rows && n < p.classes)",
        "if (q < p.rows && n <= p.classes)",
        (f"{KERNELS}test_pairwise_distance[2x65x65x3-4-float64]",),
    ),
    Bug(
        "distances-gradient-norms-of-first-queries-alone",
        "csrc/cuda/distance_coefficients.h",
        "static_cast<A*>(c.query)[t * rows + first_row + Tile::row(i)]",
        "static_cast<A*>(c.query)[t * rows + Tile::row(i)]",
        (f"{KERNELS}test_pairwise_distance[4x129x17x33-2-float64]",),
    ),
    Bug(
        "distances-gradient-second-others-are-the-first",
        "csrc/cuda/distance_gradient.h",
        "load(from + (first + o) * p.width + column)",
        "load(from + o * p.width + column)",
        (f"{KERNELS}test_pairwise_distance[2x33x33x129-0-float64]",),
    ),
    Bug(
        "distances-gradient-second-pairs-are-the-first",
        "csrc/cuda/distance_gradient.h",
        "t * p.rows * p.others + first_row * p.row_stride",
        "t * p.rows * p.others",
        (f"{KERNELS}test_pairwise_distance[2x33x33x129-4-float64]",),
    ),
    Bug(
        "distances-gradient-features-without-offset",
        "csrc/cuda/distance_gradient.h",
        "t * p.others * p.width + first_column",
        "t * p.others * p.width",
        (f"{KERNELS}test_pairwise_distance[2x33x33x129-0-float64]",),
    ),
    # ---- prototypical_loss
    Bug(
        "loss-labels-of-second-classes",
        "csrc/cuda/prototypical_loss.cu",
        "int(n) + j == label",
        "j == label",
        (f"{KERNELS}test_prototypical_loss[4x40x129x33x3-0-float64]",),
    ),
    Bug(
        "loss-without-last-queries",
        "csrc/cuda/prototypical_loss.cu",
        "for (int64_t i = 0; i < tiles; ++i)",
        "for (int64_t i = 0; i < smaller<int64_t>(tiles, 2); ++i)",
        (f"{KERNELS}test_prototypical_loss[4x40x129x33x3-0-float64]",),
    ),
    Bug(
        "loss-means-of-first-128-tasks",
        "csrc/cuda/prototypical_loss.cu",
        "const int64_t t = tile * kMeanThreads + threadIdx.x;",
        "const int64_t t = threadIdx.x;",
        (f"{KERNELS}test_many_tasks_in_one_mean",),
    ),
    Bug(
        "loss-gradient-second-scratch-of-first-tasks",
        "csrc/cuda/prototypical_loss.cu",
        "const int64_t t = first_task + local,",
        "const int64_t t = local,",
        (f"{KERNELS}test_more_pairs_than_the_scratch_of_a_gradient",),
    ),
    # ---- fast_weight_update
    Bug(
        "update-first-32-tensors-dropped",
        "csrc/cuda/fast_weight_update.cu",
        "if (batch.count == kCapacity) flush();",
        "if (batch.count == kCapacity) batch.count = 0;",
        (f"{KERNELS}test_fast_weight_update[70-tensors-float64]",),
    ),
    Bug(
        "update-second-tensor-begins-late",
        "csrc/cuda/fast_weight_update.cu",
        "(block - batch.first_block[i]) * kBlock",
        "block * kBlock",
        (f"{KERNELS}test_fast_weight_update[repeated-float64]",),
    ),
    Bug(
        "update-sums-of-second-64-rows-begin-at-0",
        "csrc/cuda/fast_weight_update.cu",
        "for (int64_t row = group * length + across;",
        "for (int64_t row = across;",
        (f"{KERNELS}test_fast_weight_update[385-columns-float64]",),
    ),
    Bug(
        "update-sums-without-column-257",
        "csrc/cuda/fast_weight_update.cu",
        "for (int64_t column = threadIdx.x; column < p.columns; column += kThreads)",
        "for (int64_t column = threadIdx.x; column < smaller<int64_t>(p.columns, kThreads); column += kThreads)",
        (f"{KERNELS}test_fast_weight_update[193-rows-of-257-float64]",),
    ),
    Bug(
        "column-sums-second-columns-are-the-first",
        "csrc/cuda/column_sums.h",
        "const int64_t i = tile * kSumColumns + lane;",
        "const int64_t i = lane;",
        (f"{KERNELS}test_fast_weight_update[385-columns-float64]",),
    ),
    # ---- steps of optimisers
    Bug(
        "step-of-first-13-tensors-dropped",
        "csrc/cuda/optimizer_steps.cu",
        "if (batch.count == kCapacity) flush();",
        "if (batch.count == kCapacity) batch.count = 0;",
        (f"{KERNELS}test_optimizer_steps[adam-27-tensors-float64]",),
    ),
    Bug(
        "step-second-tensor-begins-late",
        "csrc/cuda/optimizer_steps.cu",
        "(block - batch.first_block[i]) * kBlock",
        "block * kBlock",
        (f"{KERNELS}test_optimizer_steps[adam-four-blocks-float64]",),
    ),
    # ---- functional_mlp
    Bug(
        "gemm-every-second-task-of-65-dropped",
        "csrc/cuda/batched_gemm.h",
        "smaller(p.steps, (group + 1) * p.steps_each)",
        "smaller(p.steps, group * p.steps_each + 1)",
        (f"{KERNELS}test_functional_mlp[1-65-tasks-float64]",),
    ),
    Bug(
        "gemm-second-terms-are-the-first",
        "csrc/cuda/batched_gemm.h",
        "from_b + step * p.b_step + k * p.b_k",
        "from_b + step * p.b_step",
        (f"{KERNELS}test_functional_mlp[1-129-rows-float64]",),
    ),
    Bug(
        "gemm-bias-of-first-outputs",
        "csrc/cuda/batched_gemm.h",
        "batch * p.bias_batch + column",
        "batch * p.bias_batch + column - n",
        (f"{KERNELS}test_functional_mlp[4-129-rows-float64]",),
    ),
    Bug(
        "fused-mlp-rows-of-the-first-block",
        "csrc/cuda/fused_mlp.h",
        "t * p.x_task + start * p.widths[0]",
        "t * p.x_task",
        (f"{KERNELS}test_functional_mlp[1-65-rows-float64]",),
    ),
    Bug(
        "fused-mlp-without-input-33",
        "csrc/cuda/fused_mlp.h",
        "for (int i = lane; i < inputs; i += kFusedLanes)",
        "for (int i = lane; i < smaller(inputs, kFusedLanes); i += kFusedLanes)",
        (f"{KERNELS}test_functional_mlp[1-65-rows-float64]",),
    ),
    Bug(
        "mlp-no-gradient-of-the-last-bias",
        "csrc/cuda/functional_mlp.cu",
        "      if (b.d_biases)\n",
        "      if (b.d_biases && l + 1 < p.layers)\n",
        (f"{KERNELS}test_functional_mlp[1-own-float64]",),
    ),
    # ---- task_conv2d and its gradients
    Bug(
        "conv-weights-of-the-first-16-terms",
        "csrc/cuda/conv/gather.h",
        "int64_t(row) * p.columns + i % kTile",
        "int64_t(row % kDepth) * p.columns + i % kTile",
        conv("216-pixels"),
    ),
    Bug(
        "conv-second-outputs-over-the-first",
        "csrc/cuda/conv/gather.h",
        "group * p.columns + first_column + products.column() + j",
        "group * p.columns + products.column() + j",
        conv("129-outputs"),
    ),
    Bug(
        "conv-bias-of-the-first-task",
        "csrc/cuda/conv/gather.h",
        "task * p.bias_task + channel",
        "channel",
        conv("216-pixels"),
    ),
    Bug(
        "conv-pixels-of-later-remainders-begin-late",
        "csrc/cuda/conv/gather.h",
        "(pixel_tile - kind * tiles) * kTile + id",
        "pixel_tile * kTile + id",
        conv("strides"),
    ),
    Bug(
        "conv-taps-of-all-remainders",
        "csrc/cuda/conv/gather.h",
        "return numerator(remainder, tap) % divisor == 0;",
        "return true;",
        conv("dilated-by-the-stride"),
    ),
    Bug(
        "conv-packs-128-outputs",
        "csrc/cuda/task_conv2d.cu",
        "tile * kPackThreads + threadIdx.x, size",
        "threadIdx.x, size",
        conv("129-outputs"),
    ),
    Bug(
        "conv-second-pieces-are-the-first",
        "csrc/cuda/conv/weight_gradient.h",
        "const int64_t first = piece * length,",
        "const int64_t first = 0,",
        conv("832-pixels-to-sum"),
    ),
    Bug(
        "conv-weight-gradient-taps-of-the-first-columns",
        "csrc/cuda/conv/weight_gradient.h",
        "const int tap = (first_column + lane) / inputs",
        "const int tap = lane / inputs",
        conv("129-outputs"),
    ),
    Bug(
        "conv-cursor-one-row-at-a-time",
        "csrc/cuda/conv/cursor.h",
        "while (j >= wide)",
        "if (j >= wide)",
        conv("129-outputs"),
    ),
    # ---- norm_moments, norm_act_pool and its gradients
    Bug(
        "moments-second-pixels-apart-forgotten",
        "csrc/cuda/conv/moments.h",
        "squares += about + apart * apart * (count * n / (count + n));",
        "squares += about;",
        norm("16385-pixels", "norm_moments"),
    ),
    Bug(
        "moments-of-pieces-about-their-own-means",
        "csrc/cuda/conv/moments.h",
        "of_piece[p.channels] + apart * apart * A(pixels)",
        "of_piece[p.channels]",
        norm("140-windows", "norm_moments"),
    ),
    Bug(
        "moments-of-the-first-channels-of-a-group",
        "csrc/cuda/conv/moments.h",
        "2 * p.channels + i % each];",
        "2 * p.channels];",
        norm("groups-of-13", "norm_moments"),
    ),
    Bug(
        "pool-takes-the-last-of-equals",
        "csrc/cuda/conv/window.h",
        "value > best || value != value",
        "value >= best || value != value",
        (f"{CONV}test_pool_takes_the_first_of_equals_and_nan_before_all[identity-0.0-nan]",),
    ),
    Bug(
        "norm-second-windows-are-the-first",
        "csrc/cuda/conv/window.h",
        "const int64_t first = piece * pieces.length,",
        "const int64_t first = 0,",
        norm("140-windows"),
    ),
    Bug(
        "norm-means-of-the-first-channel",
        "csrc/cuda/conv/norm_sums.h",
        "channel < (group + 1) * each",
        "channel < group * each + 1",
        norm("groups-of-13"),
    ),
    Bug(
        "norm-means-of-128-groups",
        "csrc/cuda/conv/norm_sums.h",
        "const int64_t group = tile * kMeansThreads + threadIdx.x",
        "const int64_t group = threadIdx.x",
        norm("257-channels"),
    ),
    Bug(
        "norm-shared-weight-of-one-task",
        "csrc/cuda/norm_act_pool.cu",
        "to.shared ? p.units() : p.units_each",
        "p.units_each",
        norm("10-units"),
    ),
    Bug(
        "norm-second-derivative-without-mean-of-h-n",
        "csrc/cuda/conv/norm_curve.h",
        "mean_hn = A(-2) * rstd * o.mean.vn * o.mean.gn;",
        "",
        norm("140-windows"),
    ),
    Bug(
        "norm-second-derivative-without-bending",
        "csrc/cuda/conv/norm_curve.h",
        "o.curved ? at_g * routed * pixels.y[k].bend : A(0)",
        "A(0)",
        norm("4-tasks"),
    ),
    Bug(
        "norm-second-derivative-without-bias",
        "csrc/cuda/conv/norm_curve.h",
        "(weighted ? weight * n : A(0)) + bias",
        "(weighted ? weight * n : A(0))",
        norm("140-windows"),
    ),
    Bug(
        "norm-second-derivative-without-spread",
        "csrc/cuda/conv/norm_curve.h",
        " - n * row[2] : ",
        " : ",
        norm("140-windows"),
    ),
    # ---- inner loops: products
    Bug(
        "one-row-tiles-without-last-row",
        "csrc/cuda/inner_loop/products.h",
        "tiles_of_rows_by_rows<1, A, kShared>(team, rows, columns,",
        "tiles_of_rows_by_rows<1, A, kShared>(team, rows - 1, columns,",
        case("tiles-of-one-row"),
    ),
    Bug(
        "one-row-tiles-by-matrix-without-last-row",
        "csrc/cuda/inner_loop/products.h",
        "tiles_of_rows_by_matrix<1, A, kShared>(team, rows,",
        "tiles_of_rows_by_matrix<1, A, kShared>(team, rows - 1,",
        case("tiles-of-one-row"),
    ),
    Bug(
        "two-row-tiles-without-odd-row",
        "csrc/cuda/inner_loop/products.h",
        "down = divide_up(rows, kRows), tiles = down * across;",
        "down = rows / kRows, tiles = down * across;",
        case("tiles-of-two-rows"),
    ),
    Bug(
        "sums-over-rows-one-tile-a-thread",
        "csrc/cuda/inner_loop/products.h",
        "tiles = divide_up(rows, 4) * across;",
        "tiles = smaller(divide_up(rows, 4) * across, team.threads);",
        case("many-tiles-of-sums"),
    ),
    Bug(
        "turned-threads-miss-tiles",
        "csrc/cuda/inner_loop/products.h",
        "{other < 0 ? other + threads : other, threads}",
        "{other < 0 ? -other : other, threads}",
        case("dense"),
    ),
    # ---- inner loops: a block's task
    Bug(
        "far-rows-behind-whole-fours-to-the-start",
        "csrc/cuda/inner_loop/block.h",
        "put_quad(to + r * ld + 4 * (quads + q), v);",
        "put_quad(to + r * ld + 4 * q, v);",
        case("more-rows-than-threads"),
    ),
    Bug(
        "losses-of-one-row-a-thread",
        "csrc/cuda/inner_loop/block.h",
        "for (int r = team.id; r < count; r += team.threads) {",
        "for (int r = team.id; r < smaller(count, team.threads); r += team.threads) {",
        case("more-rows-than-threads"),
    ),
    Bug(
        "second-task-reads-the-first",
        "csrc/cuda/inner_loop/block.h",
        "static_cast<const A*>(data) + size * task",
        "static_cast<const A*>(data) + size * int(blockIdx.x)",
        case("dense"),
    ),
    Bug(
        "rates-of-elements-of-the-first-four-columns",
        "csrc/cuda/inner_loop/block.h",
        "return of_task(a.weight_rate)[row * a.in + column];",
        "return of_task(a.weight_rate)[row * a.in + column % 4];",
        case("element-rates"),
    ),
    Bug(
        "parts-of-sums-one-a-thread",
        "csrc/cuda/inner_loop/block.h",
        "part < kParts * count; part",
        "part < smaller(kParts * count, team.threads); part",
        case("nine-layers"),
    ),
    Bug(
        "second-tasks-gradients-replace-the-first",
        "csrc/cuda/inner_loop/task.h",
        "if (task == int(blockIdx.x))",
        "if (task >= int(blockIdx.x))",
        case("dense"),
    ),
    Bug(
        "sums-of-32-blocks",
        "csrc/cuda/inner_loop/sums.h",
        "b < blocks; b += kSumParts",
        "b < smaller<int64_t>(blocks, kSumParts); b += kSumParts",
        (f"{LOOPS}test_sums_of_many_blocks",),
    ),
    Bug(
        "room-for-sums-too-small",
        "csrc/cuda/inner_loop/layout.h",
        "sums.take(p.layers, p.threads + 8)",
        "sums.take(p.layers, p.threads)",
        case("narrow"),
    ),
    Bug(
        "query-part-begins-at-0",
        "csrc/cuda/inner_loop/query.h",
        "extra ? extra + int64_t(begin) * classes : nullptr",
        "extra",
        case("more-rows-than-threads"),
    ),
    Bug(
        "gram-query-part-begins-at-0",
        "csrc/cuda/inner_loop/query.h",
        "int64_t(p.query.rows) * s) + int64_t(begin) * s;",
        "int64_t(p.query.rows) * s);",
        case("gram-more-rows-than-threads"),
    ),
    Bug(
        "trajectories-one-a-thread",
        "csrc/cuda/inner_loop/paths.h",
        "for (int j = team.id; j < count; j += team.threads)",
        "for (int j = team.id; j < smaller(count, team.threads); j += team.threads)",
        (f"{LOOPS}test_more_trajectories_than_threads[163840]",),
    ),
    # ---- inner loops: the way back
    Bug(
        "weights-of-the-second-step-again",
        "csrc/cuda/inner_loop/sweep.h",
        "p.kept_states + int64_t(k) * p.state",
        "p.kept_states + int64_t(k > 1 ? 1 : k) * p.state",
        case("momentum"),
    ),
    Bug(
        "rows-of-the-first-step-again",
        "csrc/cuda/inner_loop/sweep.h",
        "p.kept_records + int64_t(k) * p.record_size",
        "p.kept_records",
        case("no-bias"),
    ),
    Bug(
        "momentum-not-carried-back",
        "csrc/cuda/inner_loop/sweep.h",
        "          all += u[i];\n",
        "",
        case("momentum"),
    ),
    Bug(
        "curvature-of-one-row-a-thread",
        "csrc/cuda/inner_loop/sweep.h",
        "for (int r = team.id; r < rows && p.loss",
        "for (int r = team.id; r < smaller(rows, team.threads) && p.loss",
        case("more-rows-than-threads"),
    ),
]
