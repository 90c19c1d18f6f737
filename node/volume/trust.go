package volume

import (
	"bytes"
	"context"
	"encoding/pem"
	"fmt"
	"sort"
	"time"

	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes"
)

// trustTimeout bounds the read of trust bundles for one volume.
const trustTimeout = 10 * time.Second

func trustAnchorsByName(client kubernetes.Interface, name string, allowMissing bool) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), trustTimeout)
	defer cancel()
	b, err := client.CertificatesV1beta1().ClusterTrustBundles().Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err) && allowMissing:
		return []byte{}, nil
	case err != nil:
		return nil, fmt.Errorf("while getting ClusterTrustBundle: %w", err)
	}
	return joinAnchors([]certificatesv1beta1.ClusterTrustBundle{*b})
}

func trustAnchorsBySigner(client kubernetes.Interface, signer string, selector *metav1.LabelSelector, allowMissing bool) ([]byte, error) {
	sel, err := metav1.LabelSelectorAsSelector(selector)
	if err != nil {
		return nil, fmt.Errorf("while parsing label selector: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), trustTimeout)
	defer cancel()
	list, err := client.CertificatesV1beta1().ClusterTrustBundles().List(ctx, metav1.ListOptions{
		LabelSelector: sel.String(),
		FieldSelector: fields.OneTermEqualSelector("spec.signerName", signer).String(),
	})
	if err != nil {
		return nil, fmt.Errorf("while listing ClusterTrustBundles: %w", err)
	}
	if len(list.Items) == 0 {
		if allowMissing {
			return []byte{}, nil
		}
		return nil, fmt.Errorf("combination of signerName and labelSelector matched zero ClusterTrustBundles")
	}
	return joinAnchors(list.Items)
}

// joinAnchors merges certificates of bundles, each once, in a stable order.
func joinAnchors(bundles []certificatesv1beta1.ClusterTrustBundle) ([]byte, error) {
	unique := map[string]struct{}{}
	for i := range bundles {
		rest := []byte(bundles[i].Spec.TrustBundle)
		for {
			var block *pem.Block
			block, rest = pem.Decode(rest)
			if block == nil {
				break
			}
			unique[string(pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes}))] = struct{}{}
		}
	}
	if len(unique) == 0 && len(bundles) > 0 {
		return nil, fmt.Errorf("ClusterTrustBundle %s holds no certificate", bundles[0].Name)
	}
	certs := make([]string, 0, len(unique))
	for c := range unique {
		certs = append(certs, c)
	}
	sort.Strings(certs)
	var out bytes.Buffer
	for _, c := range certs {
		out.WriteString(c)
	}
	return out.Bytes(), nil
}
