// The few words of cuBLASLt's C interface that `linear` needs, the same in its major versions 12 and 13, and what its
// heuristics answered: asked once for every shape, types and range of rows, kept for the life of the process.
#include <dlfcn.h>
#include <library_types.h>

#include <bit>
#include <compare>
#include <map>
#include <mutex>
#include <optional>
#include <type_traits>

#include "cublaslt.cuh"
#include "device.cuh"
#include "ops/ops.h"

namespace hybrid::cuda {

namespace {

using Status = int;  // 0: success
using Handle = struct OpaqueHandle*;
using Product = struct OpaqueProduct*;
using Layout = struct OpaqueLayout*;
using Preference = struct OpaquePreference*;
struct Algorithm {
  uint64_t data[8];
};
struct Answer {
  Algorithm algorithm;
  size_t workspace_bytes;
  Status status;
  float waves;
  int reserved[4];
};
constexpr int compute_f32 = 68, transposed = 1, epilogue_bias = 4;
enum ProductAttribute : int { transpose_a = 3, epilogue = 7, bias_pointer = 8 };
enum PreferenceAttribute : int { most_workspace_bytes = 1, reductions = 3, alignment_a = 5, alignment_d = 8 };
constexpr uint32_t reduce_in_f32 = 2;

struct Library {
  Status (*create)(Handle*);
  Status (*product_create)(Product*, int compute_type, int scale_type);
  Status (*product_destroy)(Product);
  Status (*product_set)(Product, int attribute, const void* value, size_t bytes);
  Status (*layout_create)(Layout*, int type, uint64_t rows, uint64_t columns, int64_t leading);
  Status (*layout_destroy)(Layout);
  Status (*preference_create)(Preference*);
  Status (*preference_destroy)(Preference);
  Status (*preference_set)(Preference, int attribute, const void* value, size_t bytes);
  Status (*ask)(Handle, Product, Layout a, Layout b, Layout c, Layout d, Preference, int wanted, Answer*, int* found);
  Status (*multiply)(Handle, Product, const void* alpha, const void* a, Layout, const void* b, Layout, const void* beta,
                     const void* c, Layout, void* d, Layout, const Algorithm*, void* workspace, size_t workspace_bytes,
                     cudaStream_t);
};

std::optional<Library> load() {
  void* file = nullptr;
  // One that the process has already (torch brings it) before one from the system.
  for (const int how : {RTLD_NOLOAD, 0})
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"})
      if (file == nullptr) file = dlopen(name, RTLD_NOW | RTLD_LOCAL | how);
  if (file == nullptr) return std::nullopt;
  Library l{};
  bool complete = true;
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(file, name));
    complete = complete && function != nullptr;
  };
  find(l.create, "cublasLtCreate");
  find(l.product_create, "cublasLtMatmulDescCreate");
  find(l.product_destroy, "cublasLtMatmulDescDestroy");
  find(l.product_set, "cublasLtMatmulDescSetAttribute");
  find(l.layout_create, "cublasLtMatrixLayoutCreate");
  find(l.layout_destroy, "cublasLtMatrixLayoutDestroy");
  find(l.preference_create, "cublasLtMatmulPreferenceCreate");
  find(l.preference_destroy, "cublasLtMatmulPreferenceDestroy");
  find(l.preference_set, "cublasLtMatmulPreferenceSetAttribute");
  find(l.ask, "cublasLtMatmulAlgoGetHeuristic");
  find(l.multiply, "cublasLtMatmul");
  return complete ? std::optional(l) : std::nullopt;
}

const std::optional<Library>& library() {
  static const std::optional<Library> loaded = load();
  return loaded;
}

void check_library(Status status, const char* what) {
  if (status != 0) [[unlikely]]
    throw InternalError(concat(what, " failed with status ", status));
}

// What the library keeps for us and wants back.
template <class T, Status (*Library::*destroy)(T)>
struct Owned {
  T value = nullptr;
  Owned() = default;
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() {
    if (value != nullptr) ((*library()).*destroy)(value);
  }
};

struct Key {
  int device;
  int64_t n, k, rows, out_row, x_row;
  bool bfloat, wide, bias;
  auto operator<=>(const Key&) const = default;
};

constexpr size_t workspace_bytes = size_t{32} << 20;
std::mutex guard;

Handle handle_of(int device) {
  static std::map<int, Handle> handles;
  const std::lock_guard lock(guard);
  Handle& handle = handles[device];
  if (handle == nullptr) check_library(library()->create(&handle), "cublasLtCreate");
  return handle;
}

// One algorithm serves all numbers of rows up to the next of these.
int64_t rows_bucket(int64_t rows) {
  const int64_t step = rows <= 64 ? 16 : static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(rows - 1))) / 4;
  return ceil_div(rows, step) * step;
}

// The library counts columns first: out, x and weight are its transposed [n, rows], [k, rows] and [k, n].
template <class T>
struct Call {
  Owned<Product, &Library::product_destroy> product;
  Owned<Layout, &Library::layout_destroy> weight, x, out;

  Call(const LinearParams<T>& p, int64_t rows) {
    const int type = std::is_same_v<T, BFloat16> ? CUDA_R_16BF : CUDA_R_16F;
    const auto layout = [](Layout& to, int of, int64_t first, int64_t second, int64_t leading) {
      check_library(
          library()->layout_create(&to, of, static_cast<uint64_t>(first), static_cast<uint64_t>(second), leading),
          "cublasLtMatrixLayoutCreate");
    };
    layout(weight.value, type, p.k, p.n, p.k);
    layout(x.value, type, p.k, rows, p.x_row);
    layout(out.value, p.out_f32 != nullptr ? CUDA_R_32F : type, p.n, rows, p.out_row);
    check_library(library()->product_create(&product.value, compute_f32, CUDA_R_32F), "cublasLtMatmulDescCreate");
    const auto set = [&](int attribute, const auto& value) {
      check_library(library()->product_set(product.value, attribute, &value, sizeof(value)),
                    "cublasLtMatmulDescSetAttribute");
    };
    set(transpose_a, transposed);
    if (p.bias != nullptr) set(epilogue, epilogue_bias), set(bias_pointer, static_cast<const void*>(p.bias));
  }
};

// Empty: the library has no kernel for it.
template <class T>
std::optional<Algorithm> ask(Handle handle, const LinearParams<T>& p, int64_t rows) {
  Owned<Preference, &Library::preference_destroy> preference;
  check_library(library()->preference_create(&preference.value), "cublasLtMatmulPreferenceCreate");
  const auto set = [&](int attribute, const auto& value) {
    check_library(library()->preference_set(preference.value, attribute, &value, sizeof(value)),
                  "cublasLtMatmulPreferenceSetAttribute");
  };
  set(most_workspace_bytes, uint64_t{workspace_bytes});
  set(reductions, reduce_in_f32);
  for (int attribute = alignment_a; attribute <= alignment_d; ++attribute) set(attribute, uint32_t{16});
  const Call<T> call(p, rows);
  Answer answer{};
  int found = 0;
  const Status status = library()->ask(handle, call.product.value, call.weight.value, call.x.value, call.out.value,
                                       call.out.value, preference.value, 1, &answer, &found);
  if (status != 0 || found == 0 || answer.status != 0) return std::nullopt;
  return answer.algorithm;
}

template <class T>
std::optional<Algorithm> algorithm_for(Handle handle, int device, const LinearParams<T>& p) {
  static std::map<Key, std::optional<Algorithm>> asked;
  const Key key{device,
                p.n,
                p.k,
                rows_bucket(p.rows),
                p.out_row,
                p.x_row,
                std::is_same_v<T, BFloat16>,
                p.out_f32 != nullptr,
                p.bias != nullptr};
  const std::lock_guard lock(guard);
  const auto known = asked.find(key);
  if (known != asked.end()) return known->second;
  return asked.emplace(key, ask(handle, p, key.rows)).first->second;
}

}  // namespace

template <class T>
bool library_linear(const LinearParams<T>& p, Stream stream) {
  void* const out = p.out_f32 != nullptr ? static_cast<void*>(p.out_f32) : p.out;
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  // Ours do what is less aligned than algorithms are asked for, and a bias where the library has none that is added
  // before the sum is rounded: to rows that are no multiple of 16 bytes, and where its type is not the output's.
  const bool bias_last = p.bias != nullptr && (p.out_f32 != nullptr || p.n % 8 != 0 || p.out_row % 8 != 0);
  if (!library() || bias_last || !aligned(out) || !aligned(p.bias)) return false;
  int device = 0;
  check(cudaGetDevice(&device));
  void* const workspace = scratch(workspace_bytes, stream);  // first: it says why a first call cannot be captured
  Handle handle = handle_of(device);
  const std::optional<Algorithm> algorithm = algorithm_for(handle, device, p);
  if (!algorithm) return false;
  const Call<T> call(p, p.rows);
  const float one = 1.0f, zero = 0.0f;
  check_library(library()->multiply(handle, call.product.value, &one, p.weight, call.weight.value, p.x, call.x.value,
                                    &zero, out, call.out.value, out, call.out.value, &*algorithm, workspace,
                                    workspace_bytes, static_cast<cudaStream_t>(stream)),
                "cublasLtMatmul");
  return true;
}

template bool library_linear<BFloat16>(const LinearParams<BFloat16>&, Stream);
template bool library_linear<Float16>(const LinearParams<Float16>&, Stream);

}  // namespace hybrid::cuda
