// The seam between the bindings and the kernels: every kernel's signature, once for each device.
// Raw pointers and int64 sizes only. No torch, no pybind11, so that one build serves every torch.
#pragma once

#include <cstdint>

namespace mas {

// float8 is for omega alone.
enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3, float8 = 4 };

// What happens to the gradient while the penalty is read: nothing, written anew, added to.
enum class Gradient : int { none = 0, write = 1, add = 2 };

// Where a merge puts the anchor: the weighted mean of old and new, the new values, or unchanged.
enum class Anchor : int { mean = 0, move = 1, keep = 2 };

// Work is cut into chunks of this many elements of one tensor. A sum has one slot per chunk, summed
// in order, so that its bits depend neither on the number of threads nor on the grid.
constexpr std::int64_t kChunk = 8192;

// One parameter: two tensors of `size` elements in the same memory order, and its part of the flat
// state buffers, which starts at `offset`. x and y are, by kernel: penalty: theta and gradient;
// proximal: theta and second moment (may be null); accumulate: omega and gradient; merge: theta and
// importance.
struct Segment {
  void* x;
  void* y;
  std::int64_t size;
  std::int64_t offset;
  std::int64_t first_chunk;
};

// One parameter under an optimizer: tensors of `size` elements of one dtype in the same memory
// order. moments: as many as the rule has. offset: -1 where the penalty does not hold it.
constexpr int kMoments = 3;

struct Trained {
  void* theta;
  const void* grad;
  void* moments[kMoments];
  float* step;  // AdamW: how many steps it has made
  std::int64_t size;
  std::int64_t offset;
  std::int64_t first_chunk;
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
// else float32.
struct State {
  void* omega;
  void* anchor;
  std::int64_t stride;
  std::int64_t rows;
  const double* alpha;
  const double* remainder;
};

// W' = max(0, keep W + gain Omega_t); `entry` is the entry's number, which seeds the rounding
// of bfloat16 and float8.
struct MergeRule {
  double keep;
  double gain;
  Anchor anchor;
  std::int64_t entry;
};

// A step length per element, eta_i = eta / (sqrt(v_i * correction) + eps), or eta where v is
// absent.
struct StepSize {
  double eta;
  double correction;
  double eps;
};

// torch.optim.SGD: g += decay theta; b = momentum b + (1 - dampening) g, or g at the first step;
// theta -= lr b, or lr (g + momentum b) with Nesterov. Its moment is b, none with momentum 0.
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

// torch.optim.AdamW: theta *= 1 - lr decay; m += (1 - beta1) (g - m); v = beta2 v + (1 - beta2)
// g^2; theta -= lr m_hat / (sqrt(v_hat) + eps). Its moments are m, v and, with amsgrad, the largest
// v.
struct AdamW {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double decay;
  bool amsgrad;
};

// How the penalty enters an optimizer's step, and what a GradScaler says: gradients are `scale`
// times too large (null: 1), and nothing happens where *overflow is not 0 (null: 0).
struct Entering {
  bool proximal;
  const float* scale;
  const float* overflow;
};

// One use of a weight, linear or convolution, by `batch` samples: the gradient at what it put out,
// and what it was given. With M[g, o, t, c] the sum over positions p of
//   grad[b, p, g * outputs + o] * input[b, rows[t, p], g * channels + c],
// omega[g, o, t, c] grows by the sum over samples b of abs(M), or of its square. A row of -1 counts
// as zeros; without rows, position p sees row p. omega is contiguous, float64 for float64 operands,
// else float32; rows and columns of the operands lie as their strides (in elements) say. On a GPU,
// samples, channels, and taps times positions are less than 2^30.
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
};

namespace cpu {

// The instruction set that the kernels below chose on this machine.
const char* instruction_set();

// value, one float32 or float64, is written; the gradient goes to y as 2 alpha Omega (theta - A),
// times *grad_output (null: 1). partial: `chunks` doubles of scratch.
void penalty(Segments segments, DType theta, State state, DType omega, Gradient gradient,
             const double* grad_output, double* partial, void* value, DType value_dtype,
             int threads);

void proximal(Segments segments, DType theta, State state, DType omega, StepSize step, int threads);

// One step of an optimizer with the penalty's gradient, or its proximal step behind it. Without a
// penalty the state has no rows. The first adds 1 to *step.
void adamw(ListOf<Trained> segments, DType theta, State state, DType omega, AdamW rule,
           Entering entering, int threads);

void sgd(ListOf<Trained> segments, DType theta, State state, DType omega, Sgd rule,
         Entering entering, int threads);

// x += weight * abs(y); x is float64 for a float64 y, else float32.
void accumulate(Segments segments, DType grad, double weight, int threads);

// remainder: one double per segment, what the merge adds to r. The importance has the anchor's
// dtype.
void merge(Segments segments, DType theta, State state, DType omega, MergeRule rule,
           double* partial, double* remainder, int threads);

// dtype is that of grad and input. The bits depend on the number of splits, not on that of threads;
// unlike those of the other kernels, they also depend on the instruction set.
void per_sample(PerSample use, DType dtype, int threads);

}  // namespace cpu

namespace cuda {

// The same, on the current device and the given stream. Pointers are device pointers, those in the
// segments included; the segments themselves lie on the host.
void penalty(Segments segments, DType theta, State state, DType omega, Gradient gradient,
             const double* grad_output, double* partial, void* value, DType value_dtype,
             void* stream);

void proximal(Segments segments, DType theta, State state, DType omega, StepSize step,
              void* stream);

void adamw(ListOf<Trained> segments, DType theta, State state, DType omega, AdamW rule,
           Entering entering, void* stream);

void sgd(ListOf<Trained> segments, DType theta, State state, DType omega, Sgd rule,
         Entering entering, void* stream);

void accumulate(Segments segments, DType grad, double weight, void* stream);

void merge(Segments segments, DType theta, State state, DType omega, MergeRule rule,
           double* partial, double* remainder, void* stream);

void per_sample(PerSample use, DType dtype, void* stream);

}  // namespace cuda

}  // namespace mas
