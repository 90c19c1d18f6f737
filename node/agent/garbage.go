package agent

import (
	"context"
	"errors"
	"slices"
	"sort"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/klog/v2"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	"k8s.io/kubernetes/pkg/kubelet/events"
)

const (
	// imagesEvery is how often unused images are looked for.
	imagesEvery = time.Hour
	// imagesHighPercent is the fill level of the disk from which unused images
	// are removed, imagesLowPercent the one to get down to.
	imagesHighPercent = 85
	imagesLowPercent  = 80
	// imagesMinAge is how long an image is kept at least.
	imagesMinAge = 2 * time.Minute
	// leftoverDelay is how long after a pod is gone its last traces in the
	// runtime manager are removed, together with those of others.
	leftoverDelay = 30 * time.Second
)

// collectGarbage removes unused images when the disk is filling, until ctx ends.
func (a *Agent) collectGarbage(ctx context.Context) {
	images := &imageGC{a: a, firstSeen: map[string]time.Time{}}
	pressure := newPressure(a, images)
	gc := time.NewTimer(imagesEvery)
	defer gc.Stop()
	check := time.NewTimer(0)
	defer check.Stop()
	leftovers := time.NewTimer(leftoverDelay)
	defer leftovers.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-gc.C:
			if err := images.run(ctx); err != nil && ctx.Err() == nil {
				klog.FromContext(ctx).Error(err, "Unused images not removed")
			}
			a.node.poke()
			gc.Reset(imagesEvery)
		case <-a.limited:
			check.Reset(checkNear)
		case <-a.leftovers:
			leftovers.Reset(leftoverDelay)
		case <-leftovers.C:
			// Old sandboxes of running pods, records and logs of pods that are gone.
			policy := kubecontainer.GCPolicy{MaxPerPodContainer: -1, MaxContainers: -1}
			if err := a.runtime.GarbageCollect(ctx, policy, a.admitted(), false); err != nil && ctx.Err() == nil {
				klog.FromContext(ctx).Error(err, "Leftovers of pods not removed")
			}
		case <-check.C:
			check.Reset(pressure.check(ctx))
		}
	}
}

// imageGC removes images that no container uses. Not for concurrent use.
type imageGC struct {
	a         *Agent
	firstSeen map[string]time.Time
}

// run frees space if the disk is fuller than imagesHighPercent.
func (g *imageGC) run(ctx context.Context) error {
	d, err := statDisk(g.a.opts.RootDir)
	if err != nil || d.total == 0 {
		return err
	}
	if used := 100 - d.available*100/d.total; used < imagesHighPercent {
		if _, err := g.unused(ctx); err != nil {
			return err
		}
		return g.forgetPulls(ctx)
	}
	want := int64(d.total*(100-imagesLowPercent)/100) - int64(d.available)
	freed, err := g.free(ctx, want)
	if err == nil && freed < want {
		g.a.recorder.Eventf(g.a.node.ref(), v1.EventTypeWarning, events.FreeDiskSpaceFailed,
			"Failed to garbage collect required amount of images. Attempted to free %d bytes, but only found %d bytes eligible to free.", want, freed)
	}
	return errors.Join(err, g.forgetPulls(ctx))
}

// forgetPulls drops the records of who pulled images that are gone.
func (g *imageGC) forgetPulls(ctx context.Context) error {
	began := time.Now()
	all, err := g.a.runtime.ListImages(ctx)
	if err != nil {
		return err
	}
	ids := make([]string, 0, len(all))
	for _, img := range all {
		ids = append(ids, img.ID)
	}
	for _, hook := range g.a.imageHooks {
		hook(ctx, ids, began)
	}
	return nil
}

// unused returns the images that nothing uses, the one seen first first.
func (g *imageGC) unused(ctx context.Context) ([]kubecontainer.Image, error) {
	all, err := g.a.runtime.ListImages(ctx)
	if err != nil {
		return nil, err
	}
	inUse := sets.New[string]()
	pods, err := g.a.runtime.GetPods(ctx, true)
	if err != nil {
		return nil, err
	}
	for _, p := range pods {
		for _, c := range p.Containers {
			inUse.Insert(c.ImageID)
		}
	}
	now, seen := time.Now(), map[string]time.Time{}
	var out []kubecontainer.Image
	for _, img := range all {
		since, known := g.firstSeen[img.ID]
		if !known {
			since = now
		}
		seen[img.ID] = since
		if !img.Pinned && !inUse.Has(img.ID) && now.Sub(since) >= imagesMinAge {
			out = append(out, img)
		}
	}
	g.firstSeen = seen
	sort.SliceStable(out, func(i, j int) bool { return seen[out[i].ID].Before(seen[out[j].ID]) })
	return out, nil
}

// free removes unused images until bytes are freed and returns how many were.
func (g *imageGC) free(ctx context.Context, bytes int64) (int64, error) {
	images, err := g.unused(ctx)
	if err != nil {
		return 0, err
	}
	freed := int64(0)
	for _, img := range images {
		if freed >= bytes {
			break
		}
		if err := g.a.runtime.RemoveImage(ctx, kubecontainer.ImageSpec{Image: img.ID}); err != nil {
			klog.FromContext(ctx).Error(err, "Unused image not removed", "image", img.ID)
			continue
		}
		freed += img.Size
	}
	return freed, nil
}

func formatConditions(types []v1.NodeConditionType) string {
	var s []string
	for _, t := range types {
		s = append(s, string(t))
	}
	slices.Sort(s)
	return "[" + strings.Join(s, " ") + "]"
}

// leave tells that a pod left something that is to be removed later.
func (a *Agent) leave() {
	select {
	case a.leftovers <- struct{}{}:
	default:
	}
}

// admitted reports whether all pods of the API are known.
func (a *Agent) admitted() bool { return allSources{a}.AllReady() }
