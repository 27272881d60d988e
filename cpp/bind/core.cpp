// _core: the scheduler for Python. Knows how buffers and numbers cross; decides nothing.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "common/check.h"
#include "core/batch.h"
#include "core/replay.h"
#include "core/scheduler.h"

namespace py = pybind11;

namespace hybrid {

namespace {

py::object index_of(const py::object& value) {
  auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!index) throw py::error_already_set();
  return index;
}

// The low 64 bits of a Python integer.
uint64_t low_bits(const py::object& value) { return PyLong_AsUnsignedLongLongMask(index_of(value).ptr()); }

// A Python integer of any size; what does not fit 64 bits is the caller's ValueError, as every other number out of
// range.
int64_t integer(const char* name, const py::object& value) {
  const py::object index = index_of(value);
  int overflow = 0;
  const int64_t result = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  require(overflow == 0, name, " is ", py::str(index).cast<std::string>(), ", does not fit 64 bits");
  return result;
}

Token token_id(const char* name, const py::handle& value) {
  const int64_t id = integer(name, py::reinterpret_borrow<py::object>(value));
  require(id == static_cast<Token>(id), name, " contains ", id, ", which is no token id");
  return static_cast<Token>(id);
}

std::vector<Token> token_ids(const char* name, const py::sequence& values) {
  std::vector<Token> ids;
  for (const py::handle value : values) ids.push_back(token_id(name, value));
  return ids;
}

// A read view of a one-dimensional contiguous buffer; keeps its owner alive.
template <class T>
class ReadBuffer {
 public:
  ReadBuffer(const char* name, const py::buffer& buffer) : info_(buffer.request()) {
    const std::string codes = sizeof(T) == 4 ? "il" : "LQ";
    const std::string& format = info_.format;  // one letter, perhaps behind a mark of this machine's byte order
    const bool plain =
        format.size() == 1 || (format.size() == 2 && std::string("@=<").find(format[0]) != std::string::npos);
    require(info_.ndim == 1 && info_.itemsize == sizeof(T) && plain && codes.find(format.back()) != std::string::npos,
            name, " must be one-dimensional ", sizeof(T) == 4 ? "int32" : "uint64", ", is format '", info_.format,
            "' of ", info_.itemsize, " bytes in ", info_.ndim, " dimensions");
    require(info_.size == 0 || info_.strides[0] == static_cast<py::ssize_t>(sizeof(T)), name, " must be contiguous");
  }
  std::span<const T> span() const { return {static_cast<const T*>(info_.ptr), static_cast<size_t>(info_.size)}; }

 private:
  py::buffer_info info_;
};

Config make_config(const py::object& num_blocks, const py::object& block_size, const py::object& max_num_seqs,
                   const py::object& max_num_batched_tokens, const py::object& max_model_len,
                   const py::object& vocab_size, const py::object& num_clients, const py::object& depth,
                   bool enable_prefix_caching, const py::object& num_host_blocks, const py::object& swap_cost,
                   const py::object& max_adjustments, const py::bytes& hash_key, std::vector<int64_t> decode_sizes,
                   std::vector<int64_t> mixed_seq_sizes, std::vector<int64_t> mixed_token_sizes,
                   const py::object& min_shared_tokens) {
  Config config;
  config.num_blocks = integer("num_blocks", num_blocks);
  config.block_size = integer("block_size", block_size);
  config.max_num_seqs = integer("max_num_seqs", max_num_seqs);
  config.max_num_batched_tokens = integer("max_num_batched_tokens", max_num_batched_tokens);
  config.max_model_len = integer("max_model_len", max_model_len);
  config.vocab_size = integer("vocab_size", vocab_size);
  config.num_clients = integer("num_clients", num_clients);
  config.depth = integer("depth", depth);
  config.enable_prefix_caching = enable_prefix_caching;
  config.num_host_blocks = integer("num_host_blocks", num_host_blocks);
  config.swap_cost = integer("swap_cost", swap_cost);
  config.max_adjustments = integer("max_adjustments", max_adjustments);
  config.decode_sizes = std::move(decode_sizes);
  config.mixed_seq_sizes = std::move(mixed_seq_sizes);
  config.mixed_token_sizes = std::move(mixed_token_sizes);
  config.min_shared_tokens = integer("min_shared_tokens", min_shared_tokens);
  const std::string key = hash_key;
  require(key.empty() || key.size() == config.hash_key.size(), "hash_key has ", key.size(), " bytes, must have ",
          config.hash_key.size());
  std::memcpy(config.hash_key.data(), key.data(), key.size());
  config.validate();
  return config;
}

py::tuple batch_layout(const Config& config) {
  const BatchLayout layout(config);
  py::dict columns;
  for (const Column& column : layout.columns())
    columns[column.name] = py::make_tuple(column.offset, column.dtype, column.capacity);
  return py::make_tuple(layout.bytes(), columns);
}

// A column of the outputs as a buffer; keeps the scheduler, which owns it, alive.
struct OutputColumn {
  py::object owner;
  const void* data;
  py::ssize_t item_bytes, size;
  const char* format;

  py::buffer_info info() const {
    return {const_cast<void*>(data), item_bytes, format, 1, {size}, {item_bytes}, /*readonly=*/true};
  }
};

struct PyOutputs {
  py::object owner;
  const Outputs* outputs;

  template <class Item>
  py::memoryview column(const std::vector<Item>& items, size_t size) const {
    static_assert(sizeof(Item) == 1 || sizeof(Item) == 4 || sizeof(Item) == 8);
    const char* format = sizeof(Item) == 1 ? "B" : sizeof(Item) == 4 ? "i" : std::is_signed_v<Item> ? "q" : "Q";
    return py::memoryview(
        py::cast(OutputColumn{owner, items.data(), sizeof(Item), static_cast<py::ssize_t>(size), format}));
  }
};

// The scheduler with the buffers it writes to, which it keeps exported for its lifetime: nobody can resize them.
class PyScheduler {
 public:
  PyScheduler(const Config& config, const std::vector<py::buffer>& arenas) {
    const int64_t bytes = BatchLayout(config).bytes();
    std::vector<std::byte*> pointers;
    for (const py::buffer& arena : arenas) {
      py::buffer_info info = arena.request(/*writable=*/true);
      require(PyBuffer_IsContiguous(info.view(), 'C') && info.size * info.itemsize == bytes, "arena ", pointers.size(),
              " has ", info.size * info.itemsize, " bytes, must be contiguous and have ", bytes);
      require(reinterpret_cast<uintptr_t>(info.ptr) % 8 == 0, "arena ", pointers.size(), " is not aligned to 8 bytes");
      pointers.push_back(static_cast<std::byte*>(info.ptr));
      arenas_.push_back(std::move(info));
    }
    core_.emplace(config, pointers);
  }

  // Calls f with the core, without the GIL where asked; two callers at once are an error rather than a race.
  template <class F>
  auto use(F f) {
    struct Turn {
      explicit Turn(std::atomic_flag& flag) : busy(flag) {
        if (busy.test_and_set(std::memory_order_acquire))
          throw std::runtime_error("the scheduler is in use by another thread");
      }
      ~Turn() { busy.clear(std::memory_order_release); }
      std::atomic_flag& busy;
    } turn(busy_);
    return f(*core_);
  }
  template <class F>
  auto use_without_gil(F f) {
    const py::gil_scoped_release release;
    return use(f);
  }

  void record(const py::buffer& memory, int64_t num_steps) {
    py::buffer_info info = memory.request(/*writable=*/true);
    require(PyBuffer_IsContiguous(info.view(), 'C') && reinterpret_cast<uintptr_t>(info.ptr) % 8 == 0,
            "the memory of a recording must be contiguous and aligned to 8 bytes");
    const auto num_words = static_cast<size_t>(info.size * info.itemsize / 8);
    use([&](Scheduler& core) { core.record({static_cast<int64_t*>(info.ptr), num_words}, num_steps); });
    memory_ = std::move(info);
  }

 private:
  std::vector<py::buffer_info> arenas_;
  py::buffer_info memory_;  // of the recording
  std::optional<Scheduler> core_;
  std::atomic_flag busy_;
};

// The last `num_generated` of the tokens are the request's own, of an earlier engine.
void add(PyScheduler& self, uint64_t id, const py::buffer& tokens, const py::object& num_generated,
         const py::object& first_choice, const py::object& client, const py::object& n, const py::object& priority,
         const py::object& max_tokens, const py::object& min_tokens, const py::sequence& stop_token_ids,
         double temperature, double top_p, const py::object& top_k, double min_p, double repetition_penalty,
         double frequency_penalty, double presence_penalty, const py::object& seed, const py::object& num_logprobs,
         const py::sequence& logit_bias, const py::sequence& allowed_token_ids, const py::sequence& banned_token_ids,
         const py::bytes& cache_salt, const py::object& now) {
  const ReadBuffer<Token> buffer("tokens", tokens);
  RequestSpec spec;
  spec.id = id;
  const int64_t num_own = integer("num_generated", num_generated);
  require(0 <= num_own && num_own <= std::ssize(buffer.span()), "num_generated is ", num_own, " of ",
          buffer.span().size(), " tokens");
  spec.tokens = buffer.span().first(buffer.span().size() - static_cast<size_t>(num_own));
  spec.generated = buffer.span().last(static_cast<size_t>(num_own));
  spec.first_choice = integer("first_choice", first_choice);
  spec.client = integer("client", client);
  spec.n = integer("n", n);
  spec.priority = integer("priority", priority);
  spec.max_tokens = integer("max_tokens", max_tokens);
  spec.min_tokens = integer("min_tokens", min_tokens);
  spec.stop_token_ids = token_ids("stop_token_ids", stop_token_ids);
  spec.sampling = {.temperature = temperature,
                   .top_p = top_p,
                   .min_p = min_p,
                   .repetition_penalty = repetition_penalty,
                   .top_k = integer("top_k", top_k),
                   .num_logprobs = integer("num_logprobs", num_logprobs),
                   .seed = low_bits(seed)};
  spec.frequency_penalty = frequency_penalty;
  spec.presence_penalty = presence_penalty;
  for (const py::handle item : logit_bias) {
    const auto [token, bias] = item.cast<std::pair<py::object, double>>();
    spec.logit_bias.emplace_back(token_id("logit_bias", token), bias);
  }
  spec.allowed_token_ids = token_ids("allowed_token_ids", allowed_token_ids);
  spec.banned_token_ids = token_ids("banned_token_ids", banned_token_ids);
  spec.cache_salt = static_cast<std::string_view>(cache_salt);
  spec.now = integer("now", now);
  self.use([&](Scheduler& core) { core.add(spec); });
}

std::vector<int64_t> words_of(const py::bytes& bytes) {
  const auto view = static_cast<std::string_view>(bytes);
  require(view.size() % sizeof(int64_t) == 0, view.size(), " bytes are not words");
  std::vector<int64_t> words(view.size() / sizeof(int64_t));
  std::memcpy(words.data(), view.data(), view.size());
  return words;
}

py::tuple replay(const py::bytes& config, const py::bytes& events) {
  const auto config_words = words_of(config), event_words = words_of(events);
  Replay again(config_words, event_words);
  again.run();
  const auto decisions = again.decisions();
  return py::make_tuple(py::bytes(reinterpret_cast<const char*>(decisions.data()), decisions.size() * sizeof(int64_t)),
                        again.failure());
}

PyOutputs commit(const py::object& self, int64_t step, const py::buffer& tokens) {
  const ReadBuffer<Token> buffer("tokens", tokens);
  auto& scheduler = self.cast<PyScheduler&>();
  return {self, scheduler.use_without_gil([&](Scheduler& core) { return &core.commit(step, buffer.span()); })};
}

void bind_config(py::module_& m) {
  using namespace py::literals;
  py::class_<Config>(m, "Config")
      .def(py::init(&make_config), py::kw_only(), "num_blocks"_a, "block_size"_a, "max_num_seqs"_a,
           "max_num_batched_tokens"_a, "max_model_len"_a, "vocab_size"_a, "num_clients"_a = 1, "depth"_a = 1,
           "enable_prefix_caching"_a = true, "num_host_blocks"_a = 0, "swap_cost"_a = 0, "max_adjustments"_a = 0,
           "hash_key"_a = py::bytes(), "decode_sizes"_a = std::vector<int64_t>{},
           "mixed_seq_sizes"_a = std::vector<int64_t>{}, "mixed_token_sizes"_a = std::vector<int64_t>{},
           "min_shared_tokens"_a = 0)
      .def_readonly("num_blocks", &Config::num_blocks)
      .def_readonly("block_size", &Config::block_size)
      .def_readonly("max_num_seqs", &Config::max_num_seqs)
      .def_readonly("max_num_batched_tokens", &Config::max_num_batched_tokens)
      .def_readonly("max_model_len", &Config::max_model_len)
      .def_readonly("vocab_size", &Config::vocab_size)
      .def_readonly("num_clients", &Config::num_clients)
      .def_readonly("depth", &Config::depth)
      .def_readonly("enable_prefix_caching", &Config::enable_prefix_caching)
      .def_readonly("num_host_blocks", &Config::num_host_blocks)
      .def_readonly("swap_cost", &Config::swap_cost)
      .def_readonly("max_adjustments", &Config::max_adjustments)
      .def_readonly("min_shared_tokens", &Config::min_shared_tokens)
      .def_readonly("decode_sizes", &Config::decode_sizes)
      .def_readonly("mixed_seq_sizes", &Config::mixed_seq_sizes)
      .def_readonly("mixed_token_sizes", &Config::mixed_token_sizes)
      .def_property_readonly("hash_key", [](const Config& config) {
        return py::bytes(reinterpret_cast<const char*>(config.hash_key.data()), config.hash_key.size());
      });
  m.def("batch_layout", &batch_layout, "config"_a);
}

void bind_results(py::module_& m) {
  py::class_<Batch>(m, "Batch")
      .def_readonly("step", &Batch::step)
      .def_readonly("arena", &Batch::arena)
      .def_readonly("num_tokens", &Batch::num_tokens)
      .def_readonly("num_seqs", &Batch::num_seqs)
      .def_readonly("num_decodes", &Batch::num_decodes)
      .def_readonly("num_sampled", &Batch::num_sampled)
      .def_readonly("max_query_len", &Batch::max_query_len)
      .def_readonly("max_seq_len", &Batch::max_seq_len)
      .def_readonly("num_copies", &Batch::num_copies)
      .def_readonly("num_swap_outs", &Batch::num_swap_outs)
      .def_readonly("num_swap_ins", &Batch::num_swap_ins)
      .def_readonly("num_adjustments", &Batch::num_adjustments)
      .def_readonly("bytes_used", &Batch::bytes_used)
      .def_readonly("padded_tokens", &Batch::padded_tokens)
      .def_readonly("padded_seqs", &Batch::padded_seqs)
      .def_readonly("num_prefixes", &Batch::num_prefixes)
      .def_readonly("is_padded", &Batch::is_padded);
  py::class_<OutputColumn>(m, "_OutputColumn", py::buffer_protocol()).def_buffer(&OutputColumn::info);
  const auto column = [](auto Outputs::* items) {
    return
        [items](const PyOutputs& o) { return o.column(o.outputs->*items, static_cast<size_t>(o.outputs->num_rows)); };
  };
  const auto all = [](auto Outputs::* items) {
    return [items](const PyOutputs& o) { return o.column(o.outputs->*items, (o.outputs->*items).size()); };
  };
  py::class_<PyOutputs>(m, "Outputs")
      .def_property_readonly("step", [](const PyOutputs& o) { return o.outputs->step; })
      .def_property_readonly("num_rows", [](const PyOutputs& o) { return o.outputs->num_rows; })
      .def_property_readonly("num_tokens", [](const PyOutputs& o) { return o.outputs->num_tokens; })
      .def_property_readonly("num_seqs", [](const PyOutputs& o) { return o.outputs->num_seqs; })
      .def_property_readonly("scheduled", [](const PyOutputs& o) { return o.outputs->scheduled; })
      .def_property_readonly("event_start", all(&Outputs::event_start))
      .def_property_readonly("event_ids", all(&Outputs::event_ids))
      .def_property_readonly("event_values", all(&Outputs::event_values))
      .def_property_readonly("event_kinds", all(&Outputs::event_kinds))
      .def_property_readonly("client_start", all(&Outputs::client_start))
      .def_property_readonly("ids", column(&Outputs::ids))
      .def_property_readonly("tokens", column(&Outputs::tokens))
      .def_property_readonly("finish", column(&Outputs::finish))
      .def_property_readonly("cached_tokens", column(&Outputs::cached_tokens))
      .def_property_readonly("rows", column(&Outputs::rows))
      .def_property_readonly("num_preemptions", column(&Outputs::num_preemptions))
      .def_property_readonly("scheduled_at", column(&Outputs::scheduled_at));
  py::class_<Stats>(m, "Stats")
      .def_readonly("num_running", &Stats::num_running)
      .def_readonly("num_waiting", &Stats::num_waiting)
      .def_readonly("waiting_since", &Stats::waiting_since)
      .def_readonly("blocks_used", &Stats::blocks_used)
      .def_readonly("blocks_total", &Stats::blocks_total)
      .def_readonly("empty_slots", &Stats::empty_slots)
      .def_readonly("num_swapped", &Stats::num_swapped)
      .def_readonly("host_blocks_used", &Stats::host_blocks_used)
      .def_readonly("host_blocks_total", &Stats::host_blocks_total)
      .def_readonly("blocks_swapped_out", &Stats::blocks_swapped_out)
      .def_readonly("blocks_swapped_in", &Stats::blocks_swapped_in)
      .def_readonly("num_preemptions", &Stats::num_preemptions)
      .def_readonly("prefix_queries", &Stats::prefix_queries)
      .def_readonly("prefix_hits", &Stats::prefix_hits)
      .def_readonly("steps", &Stats::steps)
      .def_readonly("step_tokens", &Stats::step_tokens)
      .def_readonly("step_token_counts", &Stats::step_token_counts);
}

void bind_scheduler(py::module_& m) {
  using namespace py::literals;
  py::class_<PyScheduler>(m, "Scheduler")
      .def(py::init<const Config&, const std::vector<py::buffer>&>(), "config"_a, "arenas"_a)
      .def("add", &add, "id"_a, "tokens"_a, py::kw_only(), "num_generated"_a = 0, "first_choice"_a = 0, "client"_a = 0,
           "n"_a = 1, "priority"_a = 0, "max_tokens"_a = 16, "min_tokens"_a = 0, "stop_token_ids"_a = py::tuple(),
           "temperature"_a = 1.0, "top_p"_a = 1.0, "top_k"_a = 0, "min_p"_a = 0.0, "repetition_penalty"_a = 1.0,
           "frequency_penalty"_a = 0.0, "presence_penalty"_a = 0.0, "seed"_a = 0, "num_logprobs"_a = -1,
           "logit_bias"_a = py::tuple(), "allowed_token_ids"_a = py::tuple(), "banned_token_ids"_a = py::tuple(),
           "cache_salt"_a = py::bytes(), "now"_a = 0)
      .def(
          "abort",
          [](PyScheduler& self, const py::buffer& ids) {
            const ReadBuffer<RequestId> buffer("ids", ids);
            return self.use([&](Scheduler& core) { return core.abort(buffer.span()); });
          },
          "ids"_a)
      .def(
          "schedule",
          [](PyScheduler& self, int64_t now) -> std::optional<Batch> {
            const Batch* batch = self.use_without_gil([now](Scheduler& core) { return core.schedule(now); });
            return batch ? std::optional(*batch) : std::nullopt;
          },
          "now"_a = 0)
      .def("commit", &commit, "step"_a, "tokens"_a)
      .def(
          "limit_running",
          [](PyScheduler& self, const py::object& max_running) {
            const int64_t most = integer("max_running", max_running);
            self.use([most](Scheduler& core) { core.limit_running(most); });
          },
          "max_running"_a)
      .def("ids_in_flight",
           [](PyScheduler& self) {
             const auto ids = self.use([](Scheduler& core) { return core.ids_in_flight(); });
             return py::bytes(reinterpret_cast<const char*>(ids.data()), ids.size() * sizeof(RequestId));
           })
      .def_property_readonly("idle",
                             [](PyScheduler& self) { return self.use([](Scheduler& core) { return core.idle(); }); })
      .def_property_readonly(
          "num_open", [](PyScheduler& self) { return self.use([](Scheduler& core) { return core.num_open(); }); })
      .def("stats", [](PyScheduler& self) { return self.use([](Scheduler& core) { return core.stats(); }); })
      .def("record", &PyScheduler::record, "memory"_a, "num_steps"_a)
      .def("forget_prefixes",
           [](PyScheduler& self) { return self.use([](Scheduler& core) { return core.forget_prefixes(); }); })
      .def("check_invariants", [](PyScheduler& self) { self.use([](Scheduler& core) { core.check_invariants(); }); });
}

}  // namespace
}  // namespace hybrid

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.doc() = "The C++ scheduler: block pool, KV cache manager, requests, batches.";
  hybrid::bind_config(m);
  hybrid::bind_results(m);
  hybrid::bind_scheduler(m);
  m.def("replay", &hybrid::replay, py::arg("config"), py::arg("events"));
}
