// What the gradients of linear_cross_entropy take beside products: sum_j += sum_i x_ij, for the
// bias, one block of dlogits at a time; and to = factor (a + b), rounded.
//
// Plan: threads over columns, each summed over the rows in ascending order, first within groups;
// threads over rows.
// Bytes: reads x (r n); reads a and b, writes `to`. Flops: r n; 2 r n.
#include "csrc/ops/linear_cross_entropy.h"

#include "csrc/common/dispatch.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/rows.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {

namespace {

constexpr int64_t kGrainElements = 16384;  // below this a second thread costs more than it saves

template <typename T>
void add_scaled(const AddScaled& p) {
  const int64_t r = p.to.size[0], n = p.to.size[1];
  float factor = p.numerator ? *static_cast<const float*>(p.numerator.data) : 1.0f;
  if (p.divisor) {
    const float divisor = *static_cast<const float*>(p.divisor.data);
    factor = divisor == 0.0f ? 0.0f : factor / divisor;
  }
  const Vec scale = set1(factor);
  if (factor == 1.0f && !p.a && p.b.data == p.to.data) return;
  parallel_for(r, kGrainElements / (n + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* a = p.a ? row_of<float>(p.a, row) : nullptr;
      const float* b = row_of<float>(p.b, row);
      T* to = row_of<T>(p.to, row);
      for_vectors(n, [&](int64_t i, int lanes) {
        Vec sum = load_lanes(b + i, lanes);
        if (a != nullptr) sum = sum + load_lanes(a + i, lanes);
        store_lanes(to + i, sum * scale, lanes);
      });
    }
  });
}

}  // namespace

void add_scaled_kernel(const AddScaled& p) {
  visit_dtype<bf16, f16>(p.to.dtype, [&](auto to) { add_scaled<typename decltype(to)::type>(p); });
}

void add_column_sums_kernel(const AddColumnSums& p) {
  constexpr int64_t kGroup = 32;
  const int64_t r = p.x.size[0], n = p.x.size[1];
  float* out = static_cast<float*>(p.sum.data);
  parallel_for(n, kGrainElements / (r + 1) + 1, [&](int64_t begin, int64_t end) {
    for_vectors(end - begin, [&](int64_t i, int lanes) {
      Vec sum = load_lanes(out + begin + i, lanes);
      for (int64_t group = 0; group < r; group += kGroup) {
        Vec part = zero();
        for (int64_t row = group; row < group + kGroup && row < r; ++row) {
          part = part + load_lanes(row_of<float>(p.x, row) + begin + i, lanes);
        }
        sum = sum + part;
      }
      store_lanes(out + begin + i, sum, lanes);
    });
  });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
