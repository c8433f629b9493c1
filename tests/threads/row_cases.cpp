// The kernels over rows. Their grains are thousands of elements: fewer rows or columns than here
// would leave threads without work.
#include "csrc/ops/bias_gelu.h"
#include "csrc/ops/cross_entropy.h"
#include "csrc/ops/layer_norm.h"
#include "csrc/ops/linear_cross_entropy.h"
#include "csrc/ops/masked_softmax.h"
#include "csrc/ops/softmax.h"
#include "tests/threads/driver.h"

namespace fastgpt::driver {
namespace {

constexpr int64_t kRows = 100;
constexpr int64_t kColumns = 2311;  // a whole number of vectors at no level, cut at no multiple

void layer_norm(Run& run, bool with_residual) {
  const Shape rows = {kRows, kColumns}, row = {kColumns}, column = {kRows};
  // The fused form also stands for what may differ from x's dtype.
  const DType wide = with_residual ? DType::f32 : run.dtype();
  LayerNormFwd fwd;
  fwd.x = run.input(rows);
  if (with_residual) {
    fwd.residual = run.input(rows);
    fwd.s = run.result("layer_norm_fwd: s", rows);
  }
  fwd.weight = run.input(row, wide);
  fwd.bias = run.input(row, wide);
  fwd.y = run.result("layer_norm_fwd: y", rows, wide);
  fwd.mean = run.result("layer_norm_fwd: mean", column, DType::f32);
  fwd.rstd = run.result("layer_norm_fwd: rstd", column, DType::f32);
  fwd.eps = 1e-5f;
  cpu::layer_norm_fwd(fwd);

  LayerNormBwd bwd;
  bwd.dy = run.input(rows, wide);
  bwd.x = with_residual ? fwd.s : fwd.x;
  bwd.weight = fwd.weight;
  bwd.mean = fwd.mean;
  bwd.rstd = fwd.rstd;
  if (with_residual) bwd.ds = run.input(rows);
  bwd.dx = run.result("layer_norm_bwd: dx", rows);
  bwd.dweight = run.result("layer_norm_bwd: dweight", row, DType::f32);
  bwd.dbias = run.result("layer_norm_bwd: dbias", row, DType::f32);
  cpu::layer_norm_bwd(bwd);
}

void softmax(Run& run, DType y_dtype) {
  const Shape rows = {kRows, kColumns};
  const TensorRef y = run.result("softmax_fwd: y", rows, y_dtype);
  cpu::softmax_fwd({run.input(rows), y});
  cpu::softmax_bwd({run.input(rows, y_dtype), y, run.result("softmax_bwd: dx", rows)});
}

void masked_softmax(Run& run, DType y_dtype, const Band& band) {
  const Shape shape = {5, 97, 403};  // (r, sq, sk)
  const TensorRef y = run.result("masked_softmax_fwd: y", shape, y_dtype);
  cpu::masked_softmax_fwd({run.input(shape), y, 0.5f, band});
  cpu::masked_softmax_bwd(
      {run.input(shape, y_dtype), y, run.result("masked_softmax_bwd: dscores", shape), 0.5f, band});
}

void bias_gelu(Run& run, bool tanh) {
  const Shape rows = {kRows, kColumns}, row = {kColumns};
  const TensorRef x = run.input(rows), bias = run.input(row);
  cpu::bias_gelu_fwd({x, bias, run.result("bias_gelu_fwd: y", rows), tanh});
  cpu::bias_gelu_bwd({run.input(rows), x, bias, run.result("bias_gelu_bwd: dx", rows),
                      run.result("bias_gelu_bwd: dbias", row, DType::f32), tanh});
}

// The classes in two blocks, as linear_cross_entropy has them.
void cross_entropy(Run& run, Reduction reduction, double label_smoothing, bool weighted) {
  const int64_t r = 1100, v = 150, sizes[] = {100, 50}, begins[] = {0, 100};
  const CrossEntropyOptions options = {v, -100, reduction, label_smoothing};
  Shape classes(r);
  for (int64_t i = 0; i < r; ++i) classes[i] = i % 11 == 3 ? options.ignore_index : i * 7 % v;
  const TensorRef target = run.integers(DType::i64, classes);
  const TensorRef weight = weighted ? run.input({v}, DType::f32) : TensorRef{};
  const TensorRef x[] = {run.input({r, sizes[0]}), run.input({r, sizes[1]})};
  std::vector<CrossEntropyRow> rows(r);
  for (int block = 0; block < 2; ++block) {
    cpu::cross_entropy_absorb({x[block], target, weight, begins[block], options, rows.data()});
  }

  CrossEntropyFinish finish;
  finish.rows = rows.data();
  finish.target = target;
  finish.weight = weight;
  finish.options = options;
  finish.row_loss = run.result("cross_entropy_finish: row_loss", {r}, DType::f32);
  if (reduction != Reduction::none) {
    finish.loss = run.result("cross_entropy_finish: loss", {}, DType::f32);
  }
  finish.lse = run.result("cross_entropy_finish: lse", {r}, DType::f64);
  finish.weight_sum = run.result("cross_entropy_finish: weight_sum", {}, DType::f32);
  cpu::cross_entropy_finish(finish);

  const TensorRef dloss = run.input(reduction == Reduction::none ? Shape{r} : Shape{}, DType::f32);
  for (int block = 0; block < 2; ++block) {
    cpu::cross_entropy_bwd({dloss, x[block], target, weight, finish.lse, finish.weight_sum,
                            run.result("cross_entropy_bwd: dx", {r, sizes[block]}), begins[block],
                            options});
  }
}

// The two forms that linear_cross_entropy has: logits from rows of weight, and a gradient that is
// added up, of float32 dlogits and x.
void matrix_product(Run& run, bool add) {
  const int64_t m = 520, n = 410, k = 300;
  MatrixProduct p{};
  p.a = add ? exchanged(run.input({k, m}, DType::f32), 0, 1) : run.input({m, k});
  p.b = add ? run.input({k, n}) : exchanged(run.input({n, k}), 0, 1);
  if (!add) p.bias = run.input({n}, DType::f32);
  p.c = add ? run.updated("matrix_product: c", {m, n}, DType::f32)
            : run.result("matrix_product: c", {m, n}, DType::f32);
  p.add = add;
  cpu::matrix_product(p);
}

// The gradients of linear_cross_entropy where dlogits are as narrow as x and weight, and are read
// by rows or by columns.
void narrow_matrix_product(Run& run, bool by_rows) {
  const int64_t m = 520, n = 410, k = 301;
  MatrixProduct p{};
  p.a = by_rows ? run.input({m, k}) : exchanged(run.input({k, m}), 0, 1);
  p.b = run.input({k, n});
  p.c = run.updated("matrix_product, narrow: c", {m, n}, DType::f32);
  p.add = true;
  cpu::matrix_product(p);
}

void add_scaled(Run& run, DType to) {
  AddScaled p{};
  p.a = run.input({kRows, kColumns}, DType::f32);
  p.b = run.input({kRows, kColumns}, DType::f32);
  p.to = run.result("add_scaled: to", {kRows, kColumns}, to);
  p.numerator = run.input({}, DType::f32);
  p.divisor = run.input({}, DType::f32);
  cpu::add_scaled(p);
}

void add_column_sums(Run& run) {
  cpu::add_column_sums({run.input({kRows, kColumns}, DType::f32),
                        run.updated("add_column_sums: sum", {kColumns}, DType::f32)});
}

}  // namespace

std::vector<Case> row_cases() {
  return {
      {"layer_norm", [](Run& run) { layer_norm(run, false); }},
      {"layer_norm, with residual, y in f32", [](Run& run) { layer_norm(run, true); }},
      {"softmax", [](Run& run) { softmax(run, run.dtype()); }},
      {"softmax, y in f32", [](Run& run) { softmax(run, DType::f32); }},
      {"masked_softmax, causal", [](Run& run) { masked_softmax(run, run.dtype(), Band{true, 0}); }},
      {"masked_softmax, window, y in f32",
       [](Run& run) { masked_softmax(run, DType::f32, Band{true, 50}); }},
      {"bias_gelu, erf", [](Run& run) { bias_gelu(run, false); }},
      {"bias_gelu, tanh", [](Run& run) { bias_gelu(run, true); }},
      {"cross_entropy, none", [](Run& run) { cross_entropy(run, Reduction::none, 0.0, false); }},
      {"cross_entropy, mean, smoothed, weighted",
       [](Run& run) { cross_entropy(run, Reduction::mean, 0.1, true); }},
      {"matrix_product, with bias", [](Run& run) { matrix_product(run, false); }},
      {"matrix_product, added", [](Run& run) { matrix_product(run, true); }},
      {"matrix_product, narrow rows", [](Run& run) { narrow_matrix_product(run, true); }},
      {"matrix_product, narrow columns", [](Run& run) { narrow_matrix_product(run, false); }},
      {"add_column_sums", add_column_sums},
      {"add_scaled", [](Run& run) { add_scaled(run, DType::f32); }},
      {"add_scaled, rounded", [](Run& run) { add_scaled(run, run.dtype()); }},
  };
}

}  // namespace fastgpt::driver
