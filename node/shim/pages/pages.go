// Package pages keeps a program's own code and constants out of its memory while nothing uses them. All of it is hints to the
// kernel: what fails changes nothing but the size.
package pages

import (
	"bufio"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// granule is how much of the program one page fault may map, in bytes: less maps less that is not used, more needs fewer mappings (the
// kernel keeps about 200 bytes for each). It is a whole number of pages, also of machines with larger ones.
const granule = 16 << 10

// Program is the read-only mappings of the program itself. It is immutable.
type Program []span

type span struct{ start, end uintptr }

// Own finds the mappings of the running program, and has the kernel map them sparsely from now on. A page fault of a file also maps what lies
// around it, up to the bounds of the mapping, and with large folios that is hundreds of kilobytes: of a large program, of which little is
// used at a time, nearly all is mapped soon. Neighbours with different advice are mappings of their own, so every other granule gets
// one that changes nothing else for pages that are in the page cache.
func Own() Program {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return nil
	}
	smaps, err := os.Open("/proc/self/smaps")
	if err != nil {
		return nil
	}
	defer smaps.Close()
	p := find(smaps, exe)
	for _, s := range p {
		s.scatter()
	}
	return p
}

// find reads /proc/self/smaps. A mapping in which the linker has written something before it was protected is not the file's: its pages do not come back.
func find(smaps io.Reader, exe string) (p Program) {
	ours := false
	for lines := bufio.NewScanner(smaps); lines.Scan(); {
		f := strings.Fields(lines.Text())
		switch {
		case len(f) > 1 && !strings.HasSuffix(f[0], ":"):
			var s span
			if s, ours = parse(f, exe); ours {
				p = append(p, s)
			}
		case ours && (f[0] == "Anonymous:" || f[0] == "Swap:") && f[1] != "0":
			p, ours = p[:len(p)-1], false
		}
	}
	return p
}

func (s span) scatter() {
	for a := (s.start + granule - 1) &^ (granule - 1); a+granule <= s.end; a += 2 * granule {
		advise(span{a, a + granule}, unix.MADV_RANDOM)
	}
}

// Drop unmaps all pages of the program. Those that are used again come back from the page cache.
func (p Program) Drop() {
	for _, s := range p {
		advise(s, unix.MADV_DONTNEED)
	}
}

func advise(s span, how int) {
	_, _, _ = unix.Syscall(unix.SYS_MADVISE, s.start, s.end-s.start, uintptr(how))
}

// parse reads the first line of a mapping; ok for a private, unwritable one of the program.
func parse(f []string, exe string) (s span, ok bool) {
	if len(f) < 6 || strings.Join(f[5:], " ") != exe || len(f[1]) != 4 || f[1][1] != '-' || f[1][3] != 'p' {
		return s, false
	}
	low, high, _ := strings.Cut(f[0], "-")
	a, errA := strconv.ParseUint(low, 16, 64)
	b, errB := strconv.ParseUint(high, 16, 64)
	return span{uintptr(a), uintptr(b)}, errA == nil && errB == nil && b > a
}
