// Calls kernels of another architecture with recorded operands and compares what they leave in memory, byte for byte,
// but for the sign and payload of a NaN made by an operation, which IEEE 754 leaves to the processor.
//
//   replay FILE    a sequence of calls as tests/aarch64.py writes them; every number is an int64
//
// For each: library, function, arguments (a number, or buffer and offset), buffers (is it float32, bytes before, bytes
// after), status. Prints the calls that differ, then how many there were; exits with 1 if one differs.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

using i64 = int64_t;
constexpr int MOST = 32;  // arguments; what a function does not take it does not see

static FILE* file;

static void read_into(void* to, size_t size) {
  if (size && fread(to, 1, size, file) != size) {
    fprintf(stderr, "the file ends in the middle of a call\n");
    exit(2);
  }
}

static i64 number() {
  i64 value;
  read_into(&value, sizeof value);
  return value;
}

static std::string bytes() {
  std::string text(size_t(number()), '\0');
  read_into(&text[0], text.size());
  return text;
}

static void* load(const std::string& library, const std::string& function) {
  static std::map<std::string, void*> loaded;
  void*& handle = loaded[library];
  if (!handle) handle = dlopen(library.c_str(), RTLD_NOW);
  void* found = handle ? dlsym(handle, function.c_str()) : nullptr;
  if (!found) {
    fprintf(stderr, "%s\n", dlerror());
    exit(2);
  }
  return found;
}

template <int... I>
static int call(void* function, const i64* a, std::integer_sequence<int, I...>) {
  return reinterpret_cast<int (*)(decltype(i64(I))...)>(function)(a[I]...);
}

static bool same(const std::string& made, const std::string& wanted, bool is_float) {
  if (made == wanted || !is_float) return made == wanted;
  for (size_t i = 0; i < made.size(); i += sizeof(float)) {
    float a, b;
    memcpy(&a, &made[i], sizeof a);
    memcpy(&b, &wanted[i], sizeof b);
    if (memcmp(&a, &b, sizeof a) && (a == a || b == b)) return false;
  }
  return true;
}

int main(int, char** arguments) {
  file = fopen(arguments[1], "rb");
  i64 calls = number(), different = 0;
  for (i64 c = 0; c < calls; ++c) {
    std::string library = bytes(), function = bytes(), what = bytes();
    i64 a[MOST] = {}, buffer_of[MOST];
    const i64 count = number();
    for (i64 i = 0; i < count; ++i) {
      buffer_of[i] = number();
      a[i] = number();
    }
    const i64 buffers = number();
    std::vector<std::string> memory, wanted;
    std::vector<bool> is_float;
    for (i64 b = 0; b < buffers; ++b) {
      is_float.push_back(number());
      memory.push_back(bytes());
      wanted.push_back(bytes());
    }
    const i64 status = number();
    for (i64 i = 0; i < count; ++i)
      if (buffer_of[i] >= 0) a[i] += i64(&memory[size_t(buffer_of[i])][0]);
    const int returned = call(load(library, function), a, std::make_integer_sequence<int, MOST>());
    bool equal = returned == status;
    for (size_t b = 0; b < memory.size(); ++b) equal = equal && same(memory[b], wanted[b], is_float[b]);
    if (!equal) {
      printf("differs: %s (%s)\n", function.c_str(), what.c_str());
      ++different;
    }
  }
  printf("%lld calls, %lld differ\n", (long long)calls, (long long)different);
  return different != 0;
}
