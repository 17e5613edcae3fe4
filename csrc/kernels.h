// The seam between the bindings and the kernels: what each kernel is called with, and the list of
// all kernels. Raw pointers and int64 sizes only. No torch, no pybind11, so that one build serves
// every torch.
#pragma once

#include <cstdint>

namespace mas {

// float8 is for omega alone.
enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3, float8 = 4 };

// What happens to the gradient while the penalty is read: nothing, written anew, added to.
enum class Gradient : int { none = 0, write = 1, add = 2 };

// Work is cut into chunks of this many elements of one tensor. A sum has one slot per chunk, summed
// in order, so that its bits depend neither on the number of threads nor on the grid.
constexpr std::int64_t kChunk = 8192;

// One parameter: two tensors of `size` elements in the same memory order (each kernel says which),
// and its part of the flat state buffers, which starts at `offset`.
struct Segment {
  void* x;
  void* y;
  std::int64_t size;
  std::int64_t offset;
  std::int64_t first_chunk;
};

// One parameter under an optimizer: theta, its gradient, and its moments, all of one dtype. The
// offset is -1 where there is no penalty on it.
constexpr int kMoments = 3;

template <class Rule>
struct OptimizerSegment : Segment {
  void* moments[kMoments];
  float* step;  // AdamW: how many steps it has made
  Rule rule;
};

template <class S>
struct ListOf {
  const S* data;
  std::int64_t count;
  std::int64_t chunks;
};

using Segments = ListOf<Segment>;

// The quadratic sum_t alpha_t (sum_i Omega_ti (theta_i - A_ti)^2) + alpha_0 * remainder: `rows`
// tasks of `stride` elements each in omega and anchor. The anchor is float64 for a float64 theta,
// else float32, or of the dtype of a theta of 16 bits.
struct State {
  DType theta_dtype;
  DType omega_dtype;
  DType anchor_dtype;
  void* omega;
  void* anchor;
  std::int64_t stride;
  std::int64_t rows;
  const double* alpha;
  const double* remainder;
};

// The penalty's value; its gradient 2 alpha Omega (theta - A) is multiplied by *grad_output.
struct Penalty {
  Segments segments;  // theta and gradient
  State state;
  Gradient gradient;
  const double* grad_output;  // null: 1
  double* partial;            // `chunks` doubles of scratch, for the value
  void* value;                // one float32 or float64; null: not asked for
  DType value_dtype;
};

// Every parameter to the exact minimiser of penalty plus squared distance, with a step length per
// element, eta_i = eta / (sqrt(v_i * correction) + eps), or eta where v is absent.
struct Proximal {
  Segments segments;  // theta and second moment (may be null)
  State state;
  double eta;
  double correction;
  double eps;
};

// One step of an optimizer with the penalty's gradient, or with the proximal step behind it.
// Without a penalty the state has no rows.
template <class Rule>
struct OptimizerStep {
  ListOf<OptimizerSegment<Rule>> segments;
  State state;
  std::int64_t moments;  // how many each segment has
  bool proximal;
  // What a GradScaler says: gradients are `scale` times too large (null: 1), and nothing happens
  // where *overflow is not 0 (null: 0).
  const float* scale;
  const float* overflow;
};

// torch.optim.SGD: g += decay theta; b = momentum b + (1 - dampening) g, or g at the first step;
// theta -= lr b, or lr (g + momentum b) with Nesterov. Its moment is b; without it momentum is 0.
// eta: what a gradient is multiplied by in the long run.
struct Sgd {
  double lr;
  double momentum;
  double dampening;
  double decay;
  double eta;
  bool nesterov;
  bool first;
};

// torch.optim.Adam and AdamW: g += l2 theta; theta *= 1 - lr decay; m += (1 - beta1) (g - m);
// v = beta2 v + (1 - beta2) g^2; theta -= lr m_hat / (sqrt(v_hat) + eps). Its moments are m, v and,
// with amsgrad, the largest v. Adds 1 to *step first.
struct AdamW {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double decay;
  double l2;
};

// omega += weight * abs(gradient); omega is float64 for a float64 gradient, else float32.
struct Accumulate {
  Segments segments;  // omega and gradient
  DType grad_dtype;
  double weight;
};

// W' = max(0, keep W + gain Omega_t), for a state of one row, and the anchor as the weighted mean
// of the old one and theta, or as it is. The importance Omega_t is float64 for a float64 theta,
// else float32.
struct Merge {
  Segments segments;  // theta and importance
  State state;
  double keep;
  double gain;
  bool moves_anchor;
  std::int64_t entry;  // the entry's number, which seeds the rounding of bfloat16 and float8 by a
                       // hash with (shift + index in the row)
  std::int64_t shift;
  double* partial;    // `chunks` doubles of scratch
  double* remainder;  // one double per segment, what the merge adds to r
};

// Importance from one call of a layer with a weight, linear or convolution, on `batch` samples: the
// gradient at its output, and its input. With M[g, o, t, c] the sum over positions p of
//   grad[b, p, g * outputs + o] * input[b, rows[t, p], g * channels + c],
// omega[g, o, t, c] grows by the sum over samples b of abs(M), or of its square. A row of -1 counts
// as zeros; without rows, position p sees row p. omega is contiguous, float64 for float64 operands,
// else float32; rows and columns of the operands lie as their strides (in elements) say. On a GPU,
// samples, channels, and taps times positions are less than 2^30. The bits depend on the number of
// splits, not on that of threads; unlike those of the other kernels, they also depend on the
// instruction set.
struct PerSample {
  void* omega;
  const void* grad;
  const void* input;
  const std::int32_t* rows;
  void* partial;  // from 2 splits on: for each, a tensor like omega, all zeros
  std::int64_t groups;
  std::int64_t outputs;
  std::int64_t taps;
  std::int64_t channels;
  std::int64_t batch;
  std::int64_t positions;
  std::int64_t grad_sample;
  std::int64_t grad_position;
  std::int64_t input_sample;
  std::int64_t input_row;
  std::int64_t splits;  // parts of the batch, summed apart so that a small omega occupies a machine
  bool square;
  DType dtype;  // of grad and input
};

// One product of a low-rank update, scale * left right, with left of rows x rank and right of rank
// x columns elements; and where its gradients go, laid out in any way (null: nowhere).
struct Strided {
  void* data;
  std::int64_t row;     // from one row to the next
  std::int64_t column;  // from one column to the next
};

struct Factor {
  Strided left;
  Strided right;
  Strided left_grad;
  Strided right_grad;
  std::int64_t rank;
  double scale;
};

// One weight, of which the update E = sum_f scale_f left_f right_f is held: its omega is row-major,
// `unit` times what is stored, and its factors are those from `first` on.
struct AdaptedWeight {
  const void* omega;
  std::int64_t rows;
  std::int64_t columns;
  double unit;
  std::int64_t first;
  std::int64_t count;
  std::int64_t first_strip;
};

// Sums over rows are added up strip by strip: so many rows.
constexpr std::int64_t kStrip = 48;

// value = alpha sum over weights of sum_ij Omega_ij E_ij^2. With G = 2 alpha Omega E,
// the gradients scale_f G right_f^T and scale_f left_f^T G, written in the value's dtype. The bits
// depend on the instruction set, and not on the number of threads.
struct LowRank {
  const AdaptedWeight* weights;
  std::int64_t count;
  const Factor* factors;
  std::int64_t strips;  // of all weights
  DType dtype;          // of the factors, and of gradients that are added to
  DType omega_dtype;
  const double* alpha;
  Gradient gradient;
  double* partial;  // one double of scratch per strip
  void* value;      // one float32 or float64
  DType value_dtype;
};

// The list of kernels. Each is known by its arguments: a device has a function `run` for every one.
#define MAS_KERNELS(X)     \
  X(Penalty);              \
  X(Proximal);             \
  X(OptimizerStep<Sgd>);   \
  X(OptimizerStep<AdamW>); \
  X(Accumulate);           \
  X(Merge);                \
  X(PerSample);            \
  X(LowRank)

namespace cpu {

#define MAS_DECLARE_ON_CPU(Kernel) void run(const Kernel& args, int threads)
MAS_KERNELS(MAS_DECLARE_ON_CPU);

// The name of the instruction set that these kernels chose on this machine.
const char* instruction_set();

}  // namespace cpu

namespace cuda {

// On the current device and the given stream. Pointers are device pointers, those in the segments
// included; the segments themselves lie on the host.
#define MAS_DECLARE_ON_CUDA(Kernel) void run(const Kernel& args, void* stream)
MAS_KERNELS(MAS_DECLARE_ON_CUDA);

}  // namespace cuda

}  // namespace mas
