// sum_j += sum_i x_ij: the bias gradient of linear_cross_entropy, one block of dlogits at a time.
//
// Plan: threads over columns; each column is summed over the rows in ascending order, first within
// groups.
// Bytes: reads x (r n). Flops: r n.
#include "csrc/ops/linear_cross_entropy.h"

#include "csrc/cpu/kernels.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/rows.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {

void add_column_sums_kernel(const AddColumnSums& p) {
  constexpr int64_t kGrainElements = 16384;  // below this a second thread costs more than it saves
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
