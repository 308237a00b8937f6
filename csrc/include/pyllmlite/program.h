// A Program: a flat list of ops over buffers that are allocated once.
#ifndef PYLLMLITE_PROGRAM_H
#define PYLLMLITE_PROGRAM_H

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "pyllmlite/export.h"
#include "pyllmlite/op.h"
#include "pyllmlite/thread_pool.h"

namespace pyllmlite {

using OpPtr = std::shared_ptr<const pll_op>;

// Takes over op.state, which is destroyed with the last owner; `keep` lives as long (what the
// op reads).  std::invalid_argument, and nothing taken over, if the op's ABI version or size is
// not this library's.
PLL_API OpPtr own_op(const pll_op& op, std::shared_ptr<void> keep = nullptr);

// Runs on the calling thread only, while the others wait; may throw.
using HostOp =
    std::function<void(const pll_batch& batch, const pll_tensor* buffers, int32_t num_buffers)>;

class PLL_API Program {
 public:
  // Row counts that follow the step.
  static constexpr int64_t kTokenRows = -1;
  static constexpr int64_t kLogitRows = -2;

  // std::invalid_argument for anything that does not fit; the same everywhere below.
  Program(int32_t max_num_tokens, int32_t max_logit_rows, std::shared_ptr<ThreadPool> pool);
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  // Each returns the id by which ops name the buffer.  Contents start as zeros.
  int add_buffer(const std::string& name, int64_t rows, int64_t width, pll_dtype dtype = PLL_F32);
  // Memory of the caller's; `keep` is held as long as the Program.
  int add_tensor(const std::string& name, const pll_tensor& tensor,
                 std::shared_ptr<void> keep = nullptr);
  // A second name, of another width, for the memory of a buffer; their lifetimes must not
  // overlap.
  int share_buffer(const std::string& name, int other, int64_t width);
  // Columns first .. first+width-1 of a buffer as one of its own, for ops that write parts of its
  // rows: the rows stand as far apart as the whole ones.
  int column_view(const std::string& name, int other, int64_t first, int64_t width);

  int add_op(OpPtr op, const std::vector<int>& buffers, const std::string& name);
  int add_host_op(HostOp op, const std::vector<int>& buffers, const std::string& name);

  // Allocates buffers and scratch; nothing can be added afterwards.
  void finish();

  // Runs a step.  std::runtime_error naming the op if one fails (an exception of a host op
  // comes out as it is); the Program can run again afterwards.
  void run(const pll_batch& batch);

  const pll_tensor& buffer(int id) const;
  // rows as given to add_buffer; for a tensor its first dimension.
  int64_t buffer_rows(int id) const;
  const std::string& buffer_name(int id) const;
  int num_buffers() const;
  size_t buffer_bytes() const;  // allocated here: buffers and scratch, tensors not counted
  int32_t max_num_tokens() const;
  int32_t max_logit_rows() const;

  struct OpProfile {
    std::string name;
    int64_t calls;
    double seconds;
  };
  // Turning it on starts from zero.
  void set_profiling(bool on);
  std::vector<OpProfile> profile() const;
  std::vector<std::string> op_names() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace pyllmlite

#endif
