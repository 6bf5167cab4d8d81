#include <onerec/runtime.h>

#include <cstdio>

int main() {
  std::printf("onerec %s on %s\n", onerec::Version(), onerec::IsaName(onerec::CurrentIsa()));
  const onerec::CudaInfo cuda = onerec::GetCudaInfo();
  std::printf("cuda: built %d, devices %d%s%s\n", cuda.built, cuda.devices,
              cuda.problem.empty() ? "" : ", ", cuda.problem.c_str());
  return 0;
}
