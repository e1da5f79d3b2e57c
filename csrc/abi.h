// SPDX-License-Identifier: Apache-2.0
// Everything Python knows about the native side. Plain C: no torch, pybind or Python headers.
// Mirrored once, in kernels/timesformer_kernels/native*.py; version and sizes are compared when a library is loaded.
#pragma once
#include <stdint.h>

#define TSK_API extern "C" __attribute__((visibility("default")))
#define TSK_ABI_VERSION 4
#define TSK_MAX_AXES 3

enum TskDtype : int32_t { TSK_F32 = 0, TSK_BF16 = 1, TSK_F16 = 2, TSK_F64 = 3 };
enum TskCls : int32_t {
  TSK_CLS_NONE = 0,
  TSK_CLS_EXCLUDE = 1,
  TSK_CLS_PER_GROUP = 2,
  TSK_CLS_KEY = 3,
  TSK_CLS_GLOBAL = 4
};
enum TskStatus : int32_t { TSK_OK = 0, TSK_INVALID = -1 };  // > 0: a cudaError_t

// One [B, S, H, D] tensor. Strides count elements; the last dimension has stride 1.
struct TskTensor {
  void* data;
  int64_t batch, token, head;
};

// One axis of a view (grid.View): `size` positions, `step` token rows apart.
struct TskAxis {
  int64_t size, step;
};

struct TskAttention {
  TskTensor q, k, v;               // read
  TskTensor out;                   // forward: written
  TskTensor dout;                  // backward: read
  TskTensor dq, dk, dv;            // backward: written
  TskAxis groups[TSK_MAX_AXES];    // outermost first, unused ones are {1, 0}; sizes multiply to G
  TskAxis sequence[TSK_MAX_AXES];  // sizes multiply to L
  int64_t batch, tokens, heads, head_dim;
  double scale;              // of the scores
  const float* cls_weights;  // [B, G] contiguous, weight of each group's class output; null: 1 / G
  const void* q_bias;        // [H, D] contiguous, added to every query; null: none. Forward on the CPU alone
  void* workspace;           // tsk_attn_workspace() or tsk_cuda_workspace() bytes, 64-byte aligned
  float* stats;         // CUDA: [B, H, G, M, 2] contiguous, each row's largest score and the sum of exp(score - it),
                        // M members of a sequence; forward: written, backward: read; null: not kept. Behind them
                        // [B, G, H, D], each group's own class output, for TSK_CLS_PER_GROUP where sequences stream
                        // (tsk_cuda_regime), or have more than 128 members of head_dim 64. CPU: unused
  int64_t max_threads;  // CPU: upper bound of parallel workers
  int32_t dtype;        // TskDtype of all tensors
  int32_t cls;          // TskCls
};

// Rows [B, S, D] of a fused step, read in place. Strides count elements; the last dimension has stride 1.
struct TskRows {
  const void* data;
  int64_t batch, token;
};

enum TskStep : int32_t {
  TSK_ADD_LAYER_NORM_FWD = 0,  // x, branch, weight, bias -> sum, out
  TSK_ADD_LAYER_NORM_BWD = 1,  // x (the sum), dout, dsum, weight -> dx, dbranch, dweight, dbias
  TSK_BIAS_GELU_FWD = 2,       // x, bias -> out
  TSK_BIAS_GELU_BWD = 3        // x, dout, bias -> dx, dbias
};

// A call of one of them on the CPU. What a step does not name is not looked at; all results are contiguous.
struct TskStepCall {
  TskRows x, branch;          // branch.data null: none
  TskRows dout, dsum;         // dsum.data null: none
  const void *weight, *bias;  // [D]
  const void* branch_bias;    // [D] of dtype, added to every branch row; null: none. Forward alone
  const float* row_scale;     // factor of each branch row; null: 1
  int64_t scale_batch, scale_token;
  void *sum, *out;        // [B, S, D]; sum null without a branch. Forward: sum may be x, and out may be x or branch,
                          // where these are contiguous and of its dtype
  void *dx, *dbranch;     // [B, S, D]; dbranch null: not wanted
  void *dweight, *dbias;  // [D]
  void* workspace;        // tsk_step_workspace() bytes, 64-byte aligned
  double eps;             // of LayerNorm
  int64_t batch, tokens, dim;
  int64_t max_threads;   // upper bound of parallel workers
  int32_t dtype;         // TskDtype of x, dout, dsum, sum, out and dx
  int32_t branch_dtype;  // of branch and dbranch: dtype or, beside TSK_F32, a 16-bit one
  int32_t weight_dtype;  // of weight and dweight: dtype or, beside 16-bit rows, TSK_F32
  int32_t bias_dtype;    // of bias and dbias: likewise
  int32_t skip_cls;      // row 0 of each clip takes no residual, and its branch row is not read
  int32_t unused;
};

TSK_API int32_t tsk_abi_version();
TSK_API int64_t tsk_attention_size();  // sizeof(TskAttention)
TSK_API const char* tsk_last_error();  // thread-local text of the last failure

// CPU library. The core never allocates: the caller asks for the bytes (negative: a TskStatus) and brings them.
TSK_API int64_t tsk_attn_workspace(const TskAttention* a, int32_t backward);
TSK_API int32_t tsk_attn_fwd(const TskAttention* a);
TSK_API int32_t tsk_attn_bwd(const TskAttention* a);
TSK_API int64_t tsk_step_size();  // sizeof(TskStepCall)
TSK_API int64_t tsk_step_workspace(const TskStepCall* c, int32_t step);
TSK_API int32_t tsk_step_run(const TskStepCall* c, int32_t step);

// Threads are the caller's: a function of the signature of libtorch's torch_parallel_for, or null to run serially.
TSK_API void tsk_set_parallel_for(void* fn);
TSK_API const char* tsk_isa();                    // instruction set in use
TSK_API const char* tsk_isas();                   // usable ones, best first, separated by spaces
TSK_API int32_t tsk_force_isa(const char* name);  // for tests and benchmarks

// CUDA library: tsk_abi_version, tsk_attention_size, tsk_last_error, and these. All pointers are the device's. Nothing
// is allocated and nothing waits: work is queued on `stream` (a cudaStream_t) of `device`, which need not be the
// current one and is not left current. Returned: a TskStatus, or the cudaError_t of what failed.
TSK_API const char* tsk_cuda_why_not(int32_t device);  // why kernels cannot run on it; null: they can
TSK_API const char* tsk_cuda_regime(const TskAttention* a, int32_t backward, int32_t device);  // kernels; null: failed
TSK_API int64_t tsk_cuda_workspace(const TskAttention* a, int32_t backward);  // bytes; negative: a TskStatus
TSK_API int32_t tsk_cuda_fwd(const TskAttention* a, int32_t device, void* stream);
TSK_API int32_t tsk_cuda_bwd(const TskAttention* a, int32_t device, void* stream);
