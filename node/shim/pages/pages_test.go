package pages

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestFind(t *testing.T) {
	const clean = "\nRss: 4 kB\nAnonymous: 0 kB\nSwap: 0 kB\nVmFlags: rd ex\n"
	for smaps, want := range map[string]Program{
		"00400000-02c00000 r-xp 00000000 fe:00 12 /bin/knarr" + clean:                                                      {{0x400000, 0x2c00000}},
		"00400000-02c00000 r-xp 00000000 fe:00 12 /bin/knarr\nAnonymous: 4 kB\nSwap: 0 kB\n":                               {},
		"00400000-02c00000 r--p 00000000 fe:00 12 /bin/knarr\nAnonymous: 0 kB\nSwap: 4 kB\n":                               {},
		"00400000-02c00000 rw-p 00000000 fe:00 12 /bin/knarr" + clean:                                                      {},
		"00400000-02c00000 r--s 00000000 fe:00 12 /bin/knarr" + clean:                                                      {},
		"00400000-02c00000 r-xp 00000000 fe:00 12 /bin/knarr (deleted)" + clean:                                            {},
		"7f0000000000-7f0000001000 r-xp 00000000 fe:00 13 /lib/other" + clean:                                              {},
		"7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0 [stack]" + clean + "1000-2000 r--p 0 fe:00 12 /bin/knarr" + clean: {{0x1000, 0x2000}},
		"": {},
	} {
		require.ElementsMatch(t, want, find(strings.NewReader(smaps), "/bin/knarr"), smaps)
	}
	const sealed = "/memfd:copy:knarr-shim (deleted)"
	require.Len(t, find(strings.NewReader("1000-2000 r-xp 0 00:01 12 "+sealed+clean), sealed), 1, "a sealed copy in memory")
}

// TestScatter: one fault maps no more than the granule that it is in.
func TestScatter(t *testing.T) {
	const size = 16 << 20
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	require.NoError(t, err)
	defer f.Close()
	_, err = f.Write(make([]byte, size)) // in the page cache
	require.NoError(t, err)
	b, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_PRIVATE)
	require.NoError(t, err)
	defer func() { require.NoError(t, unix.Munmap(b)) }()
	start := uintptr(unsafe.Pointer(&b[0]))
	s := span{start, start + size}
	s.scatter()
	const touched = 4
	sum := byte(0)
	for i := range touched {
		sum += b[i*size/touched+size/9]
	}
	require.Zero(t, sum)
	require.LessOrEqual(t, resident(t, f.Name()), touched*granule)
	Program{s}.Drop()
	require.Zero(t, resident(t, f.Name()))
}

// TestOwn: the test itself runs on.
func TestOwn(t *testing.T) {
	p := Own()
	require.NotEmpty(t, p)
	p.Drop()
}

// resident is how much of a file is mapped, in bytes.
func resident(t *testing.T, name string) (sum int) {
	smaps, err := os.ReadFile("/proc/self/smaps")
	require.NoError(t, err)
	ours := false
	for line := range strings.Lines(string(smaps)) {
		if f := strings.Fields(line); strings.Contains(f[0], "-") {
			ours = f[len(f)-1] == name
		} else if ours && f[0] == "Rss:" {
			n, err := strconv.Atoi(f[1])
			require.NoError(t, err)
			sum += n << 10
		}
	}
	return sum
}
