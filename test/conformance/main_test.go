package main

import (
	"archive/tar"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	imageutils "k8s.io/kubernetes/test/utils/image"
)

const report = `<testsuites><testsuite>
<testcase name="[It] [sig-cli] Kubectl a [Conformance]" status="passed"></testcase>
<testcase name="[It] [sig-cli] Kubectl b [Conformance]" status="failed"><failure>no</failure></testcase>
<testcase name="[It] [sig-apps] Job c [Conformance]" status="panicked"><error>no</error></testcase>
<testcase name="[It] [sig-apps] Job d [Conformance]" status="skipped"><skipped></skipped></testcase>
<testcase name="[ReportAfterSuite] e" status="passed"></testcase>
</testsuite></testsuites>`

func TestSummaryCountsAndNamesFailures(t *testing.T) {
	c := config{out: t.TempDir()}
	require.NoError(t, os.WriteFile(c.report(), []byte(report), 0o600))
	require.NoError(t, os.WriteFile(c.log(), []byte("noise\nRan 3 of 9 Specs in 1.0 seconds\nFAIL! -- 1 Passed | 2 Failed\nmore\n"), 0o600))
	var out strings.Builder
	c.summarize(&out)
	require.Equal(t, `sig-apps                  0 passed    1 failed
sig-cli                   1 passed    1 failed
failed: [It] [sig-apps] Job c [Conformance]
failed: [It] [sig-cli] Kubectl b [Conformance]
Ran 3 of 9 Specs in 1.0 seconds
FAIL! -- 1 Passed | 2 Failed
`, out.String())
}

// What knarr packs is what a client of registries gets from the mirror, under each name of the suite's table.
func TestMirrorServesWhatWasPacked(t *testing.T) {
	const layer, settings = "the layer", `{"os":"linux"}`
	sum := func(s string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(s))) }
	manifest := fmt.Sprintf(`{"schemaVersion":2,"config":{"digest":"sha256:%s"},"layers":[{"digest":"sha256:%s"}]}`, sum(settings), sum(layer))
	index := fmt.Sprintf(`{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:%s"}]}`, sum(manifest))
	p := picture{ids: []imageutils.ImageID{imageutils.Agnhost, imageutils.AgnhostPrev}}
	c := config{out: t.TempDir(), pictures: []picture{p}}
	require.NoError(t, os.MkdirAll(filepath.Dir(c.archive(p)), 0o755))
	f, err := os.Create(c.archive(p))
	require.NoError(t, err)
	w := tar.NewWriter(f)
	for _, e := range [][2]string{{"blobs/sha256/" + sum(layer), layer}, {"blobs/sha256/" + sum(settings), settings}, {"blobs/sha256/" + sum(manifest), manifest},
		{"index.json", index}, {"oci-layout", "{}"}} {
		require.NoError(t, w.WriteHeader(&tar.Header{Name: e[0], Size: int64(len(e[1])), Mode: 0o644}))
		_, err := w.Write([]byte(e[1]))
		require.NoError(t, err)
	}
	require.NoError(t, errors.Join(w.Close(), f.Close()))

	m, err := c.mirror(t.Context())
	require.NoError(t, err)
	hosts, err := os.ReadFile(filepath.Join(c.registries(), "registry.k8s.io", "hosts.toml"))
	require.NoError(t, err)
	url := regexp.MustCompile(`server = "(.*)"`).FindStringSubmatch(string(hosts))
	require.NotNil(t, url, string(hosts))
	get := func(path string) string {
		answer, err := http.Get(url[1] + "/v2/" + path)
		require.NoError(t, err)
		defer answer.Body.Close()
		body, err := io.ReadAll(answer.Body)
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, answer.StatusCode, "%s: %s", path, body)
		return string(body)
	}
	for _, n := range p.names() {
		repository, tag, _ := strings.Cut(strings.TrimPrefix(n, "registry.k8s.io/"), ":")
		require.Equal(t, manifest, get(repository+"/manifests/"+tag))
		require.Equal(t, layer, get(repository+"/blobs/sha256:"+sum(layer)))
	}
	require.NoError(t, m.close())
	require.NoDirExists(t, m.dir)
}

func TestTreesKeepModesAndLinks(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(from, "tmp"), 0o777))
	require.NoError(t, os.Chmod(filepath.Join(from, "tmp"), 0o777|fs.ModeSticky))
	require.NoError(t, os.WriteFile(filepath.Join(from, "tmp", "su"), []byte("x"), 0o600))
	require.NoError(t, os.Chmod(filepath.Join(from, "tmp", "su"), 0o755|fs.ModeSetuid))
	require.NoError(t, os.Symlink("/elsewhere", filepath.Join(from, "link")))
	require.NoError(t, copyTree(from, to))
	for name, mode := range map[string]fs.FileMode{"tmp": fs.ModeDir | fs.ModeSticky | 0o777, "tmp/su": fs.ModeSetuid | 0o755} {
		info, err := os.Stat(filepath.Join(to, name))
		require.NoError(t, err)
		require.Equal(t, mode, info.Mode(), name)
	}
	link, err := os.Readlink(filepath.Join(to, "link"))
	require.NoError(t, err)
	require.Equal(t, "/elsewhere", link)
}
