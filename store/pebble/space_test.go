package pebble

import (
	"io"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"
)

// TestSkippedSync follows what of a log file survives power loss.
func TestSkippedSync(t *testing.T) {
	for _, c := range []struct {
		name  string
		steps string // s: skipping sync, S: real sync, c: close; x: write one byte
		want  string
	}{
		{"never synced", "x", ""},
		{"skipped", "xs", ""},
		{"synced", "xS", "x"},
		{"synced later", "xsxS", "xx"},
		{"tail skipped", "xSxs", "x"},
		{"owed at close", "xsc", "x"},
		{"nothing owed at close", "xSc", "x"},
	} {
		t.Run(c.name, func(t *testing.T) {
			mem := vfs.NewCrashableMem()
			fs := &spaceFS{FS: mem, space: newSpace()}
			require.NoError(t, fs.MkdirAll("/db", 0o700))
			f, err := fs.Create("/db/000001.log", vfs.WriteCategoryUnspecified)
			require.NoError(t, err)
			for _, name := range []string{"/", "/db"} {
				dir, err := mem.OpenDir(name)
				require.NoError(t, err)
				require.NoError(t, dir.Sync())
				require.NoError(t, dir.Close())
			}
			for _, step := range c.steps {
				switch step {
				case 'x':
					_, err = f.Write([]byte("x"))
				case 's', 'S':
					fs.skipSync.Store(step == 's')
					err = f.SyncData()
				case 'c':
					err = f.Close()
				}
				require.NoError(t, err)
			}
			r, err := mem.CrashClone(vfs.CrashCloneCfg{}).Open("/db/000001.log")
			require.NoError(t, err)
			got, err := io.ReadAll(r)
			require.NoError(t, err)
			require.Equal(t, c.want, string(got))
		})
	}
}
